"""Benchmarks that compare: every candidate of a case is checked first, then timed in turn within
one run, and the medians are set against each other. ``--quick`` takes fewer rounds and sizes;
``--results DIR`` writes a JSON file named after the device."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import OURS, device_name, medians

import ddpm_fast

ROWS = pytest.StashKey[list[dict[str, Any]]]()
BANDWIDTH = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer rounds and sizes")
    parser.addoption("--results", type=Path, help="folder for a JSON file named after the device")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest) -> float:
    """Bytes a second that torch copies here (read and written), 256 MB at a time."""
    source, target = torch.ones(2**25), torch.ones(2**25)
    seconds = medians({"copy": lambda: target.copy_(source)}, 0.5)["copy"]
    request.config.stash[BANDWIDTH] = 2 * source.nbytes / seconds
    return request.config.stash[BANDWIDTH]


Compare = Callable[..., dict[str, float]]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, copy_bandwidth: float) -> Compare:
    """compare(case, elements, bytes_moved, candidates, check) → seconds a call, by name."""
    quick = request.config.getoption("--quick")

    def run(
        case: str,
        elements: int,
        bytes_moved: int,
        candidates: dict[str, Callable[[], object]],
        check: Callable[[], None],
    ) -> dict[str, float]:
        check()  # a wrong result is a failure, not a speed
        with torch.inference_mode():
            seconds = medians(candidates, 0.3 if quick else 3.0)
            benchmark.pedantic(candidates[OURS], rounds=20, iterations=5, warmup_rounds=2)
        ours = seconds[OURS]
        row = {
            "case": case,
            "elements": elements,
            "microseconds": {name: round(1e6 * s, 2) for name, s in seconds.items()},
            "ratio": {name: round(s / ours, 2) for name, s in seconds.items() if name != OURS},
            "gigabytes_per_second": round(bytes_moved / ours / 1e9, 2),
            "percent_of_copy": round(100 * bytes_moved / ours / copy_bandwidth, 1),
        }
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        return seconds

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    bandwidth = config.stash[BANDWIDTH] / 1e9
    write = terminalreporter.write_line
    terminalreporter.section("ratios to ddpm_fast (medians, interleaved)")
    write(f"{device_name()}; torch {torch.__version__}; {ddpm_fast.backends()['cpu'].detail}")
    write(f"copy: {bandwidth:.1f} GB/s")
    write(f"{'case':<34}{'elements':>10}{'µs':>10}{'GB/s':>7}{'% copy':>8}  slower by")
    for row in rows:
        others = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in row["ratio"].items())
        write(
            f"{row['case']:<34}{row['elements']:>10}{row['microseconds'][OURS]:>10.1f}"
            f"{row['gigabytes_per_second']:>7.1f}{row['percent_of_copy']:>8.1f}  {others}"
        )
    folder = config.getoption("--results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', device_name()).strip('-')}.json"
        content = {
            "device": device_name(),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "ddpm_fast": ddpm_fast.__version__,
            "backend": ddpm_fast.backends()["cpu"].detail,
            "quick": config.getoption("--quick"),
            "copy_gigabytes_per_second": round(bandwidth, 2),
            "rows": rows,
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write(f"written to {path}")


@pytest.fixture
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """[N, 3, 32, 32]; --quick leaves out the largest."""
    shape = (request.param, 3, 32, 32)
    if request.config.getoption("--quick") and request.param > 256:
        pytest.skip("--quick leaves out the largest size")
    return shape
