"""Benchmarks that compare: every candidate of a case is checked first, then timed in turn within
one run, and the medians are set against each other. ``--device cuda`` measures on a GPU,
``--quick`` takes fewer rounds and sizes, ``--results DIR`` writes a JSON named after the device."""

from __future__ import annotations

import datetime
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import LARGE, QUICK_SIZES, SIZES, device_name, medians, preferring
from results import OURS, file_name, table, write

import ddpm_fast
from ddpm_fast.backends import select

ROWS = pytest.StashKey[list[dict[str, Any]]]()
BANDWIDTH = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer rounds and sizes")
    parser.addoption("--results", type=Path, help="folder for a JSON file named after the device")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="what is measured")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """size: of each case in turn; large_size: where memory bandwidth or arithmetic decides."""
    if not metafunc.function.__name__.startswith("bench_"):
        return
    device = metafunc.config.getoption("--device")
    sizes = (QUICK_SIZES if metafunc.config.getoption("--quick") else SIZES)[device]
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", [(n, 3, 32, 32) for n in sizes], ids=str, indirect=True)
    if "large_size" in metafunc.fixturenames:
        metafunc.parametrize("large_size", [(LARGE[device], 3, 32, 32)], ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """What --device says; on a GPU the CUDA or Triton kernels must run."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            available = torch.cuda.is_available()
        if not available:
            pytest.skip("--device cuda: torch finds no GPU")
        device = torch.device("cuda", torch.cuda.current_device())
    select(device)  # raises where no kernels run there
    return device


@pytest.fixture
def size(request: pytest.FixtureRequest, device: torch.device) -> tuple[int, ...]:
    """[N, 3, 32, 32], where a GPU has room for it and what plain PyTorch makes of it."""
    shape: tuple[int, ...] = request.param
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if 4 * 16 * math.prod(shape) > torch.cuda.mem_get_info(device)[0]:
            pytest.skip(f"{shape} takes more memory than is free")
    return shape


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest, device: torch.device) -> float:
    """Bytes a second that torch copies here (read and written), far more than caches hold."""
    count = 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.ones(count, device=device) for _ in range(2))
    seconds = medians({"copy": lambda: target.copy_(source)}, 0.5, device)["copy"]
    request.config.stash[BANDWIDTH] = 2 * source.nbytes / seconds
    return request.config.stash[BANDWIDTH]


Compare = Callable[..., dict[str, float]]
Record = Callable[..., None]


@pytest.fixture
def compare(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, copy_bandwidth: float
) -> Compare:
    """compare(case, elements, bytes_moved, candidates, check) → seconds a call, by name."""
    quick = request.config.getoption("--quick")

    def run(
        case: str,
        elements: int,
        bytes_moved: int,
        candidates: dict[str, Callable[[], object]],
        check: Callable[[], None],
    ) -> dict[str, float]:
        for name in candidates:  # a wrong result is a failure, not a speed
            if name.startswith(OURS):
                with preferring(name.removeprefix(OURS).strip()):
                    check()
        with torch.inference_mode():
            on_gpu = device.type == "cuda"
            seconds = medians(candidates, 0.3 if quick else 1.0 if on_gpu else 3.0, device)

            def once() -> None:
                candidates[OURS]()
                if on_gpu:
                    torch.cuda.synchronize()

            benchmark.pedantic(once, rounds=20, iterations=5, warmup_rounds=2)
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
        add_row(request.config, row)
        return seconds

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, copy_bandwidth: float) -> Record:
    """record(case, elements, rounds, **more): rounds of seconds by name, measured by the case
    itself, and what else is to be known of them."""

    def run(case: str, elements: int, rounds: list[dict[str, float]], **more: Any) -> None:
        seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        benchmark.pedantic(lambda: None)  # the figures are the case's own
        add_row(
            request.config,
            {
                "case": case,
                "elements": elements,
                "microseconds": {name: round(1e6 * s, 2) for name, s in seconds.items()},
                "ratio": {
                    name: round(s / seconds[OURS], 2) for name, s in seconds.items() if name != OURS
                },
                **more,
            },
        )

    return run


def add_row(config: pytest.Config, row: dict[str, Any]) -> None:
    """Keeps a row, in --results too: it is there if a later case takes the run down."""
    config.stash[ROWS].append(row)
    folder = config.getoption("--results")
    if folder is not None:
        report = report_of(config)
        write(folder / f"{file_name(report['device'])}.json", report)


def report_of(config: pytest.Config) -> dict[str, Any]:
    device = torch.device(config.getoption("--device"))
    return {
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "ddpm_fast": ddpm_fast.__version__,
        "backend": ddpm_fast.backends()[select(device)].detail,
        "quick": config.getoption("--quick"),
        "copy_gigabytes_per_second": round(config.stash[BANDWIDTH] / 1e9, 2),
        "rows": config.stash[ROWS],
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("ratios to ddpm_fast (medians, interleaved)")
        for line in table(report_of(config)):
            terminalreporter.write_line(line)
