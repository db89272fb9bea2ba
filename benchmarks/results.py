"""A run's results: the rows of a file, kept from run to run, and shown. Nothing here needs the
package, or torch.

A file is of one device: ``device``, ``backend``, ``torch``, ``ddpm_fast``, ``date`` and
``copy_gigabytes_per_second`` of the run that wrote last, and ``rows``, each a case:

==============================  ====================================================================
``op``                          stem of the file that measures it: "reverse_step", "sample", …
``case``                        what is measured, once in a file
``shape``, ``dtype``            of the state or the images, [N, …]; null where it is no one tensor
``elements``                    that a call computes
``bytes``, ``flops``            that a call has to move, at the floor, and to compute, or null
``microseconds``                a call, or a step, by candidate: medians; OURS is always there, but
                                in a row that has failed
``ratio``                       the other candidates' to ours
``gigabytes_per_second``        ``bytes`` by our time
``percent_of_copy``             the same against ``copy_gigabytes_per_second``
``images``, ``steps``           of a call that draws images: ``microseconds`` are of the whole call
``failed``                      why there is no speed: the result was wrong, or the case crashed
``test``                        the benchmark that took it, file and parameters
``date``, ``torch``,            of the run that took this row, as the next three
``ddpm_fast``, ``quick``,
``copy_gigabytes_per_second``
==============================  ====================================================================

What else a row holds (``relative_error``, ``p95_milliseconds``, …) is its case's own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "ddpm_fast"
OF_RUN = ("date", "torch", "ddpm_fast", "quick", "copy_gigabytes_per_second")

Row = dict[str, Any]
Report = dict[str, Any]

# By how their cases begin: rows of before they named their op.
OPS = {
    "training step": "denoising_loss",
    "sampling step": "sampling",
    "a step in a session": "session",
    "samples of": "session",
    "scheduler": "schedulers",
    "OpenAI": "openai",
    "trainer": "training_overhead",
    "host's time": "launch",
    "reverse_step in a graph": "launch",
    "a captured step": "trajectory",
    "steps a graph": "trajectory",
    "Triton reverse_step": "triton_cuts",
}
IMAGE = (3, 32, 32)
OF_PIXELS = {"add_noise", "denoising_loss", "lucidrains", "openai", "randn", "reverse_step",
             "schedulers", "triton_cuts", "vlb_terms"}  # fmt: skip
OF_ONE_SHAPE = {"launch", "session", "training_overhead"}
FILES = {"rewrites": "sampling"}  # of ops that no file is named after
OF_NETWORKS = {"sampling", "rewrites", "trajectory"}  # in the dtype that the device has


def file_name(device: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", device).strip("-")


def path_of(folder: Path, device: str, quick: bool) -> Path:
    """Of a device's results; those of quick runs never join the others."""
    return folder / f"{file_name(device)}{'.quick' if quick else ''}.json"


def read(path: Path) -> Report:
    """A file's report, every row with what all of them have.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        report = json.loads(Path(path).read_text())
        return {**report, "rows": [normalised(row, report) for row in report["rows"]]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of benchmarks: {error!r}") from error


def rows(path: Path) -> list[Row]:
    return read(path)["rows"]


def normalised(row: Row, report: Report) -> Row:
    """A row with everything that one has today, derived where it was written before that."""
    found = {key: report.get(key) for key in OF_RUN} | {"bytes": None, "flops": None} | row
    found.setdefault("test", None)
    found.setdefault("op", op_of(row["case"]))
    found.setdefault("dtype", dtype_of(row["case"], found["op"]))
    if "shape" not in found:
        found["shape"] = shape_of(row["case"], found["op"], row["elements"])
        found["case"] = with_shape(row["case"], found["shape"], found["op"])
    return found


def with_shape(case: str, shape: list[int] | None, op: str) -> str:
    """A case named once in a file: its shape is said, if it is not yet."""
    if shape is None or op in OF_ONE_SHAPE or "[" in case or "batch" in case:
        return case
    return f"{case} {list(shape)}"


def op_of(case: str) -> str:
    for beginning, op in OPS.items():
        if case.startswith(beginning):
            return op
    return re.split("[ ,]", case)[0]


def dtype_of(case: str, op: str) -> str | None:
    if case == "reverse_step bfloat16 model":  # whose state is not
        return "float32"
    named = re.search("bfloat16|float16|float32|float64|uint8", case)
    if named:
        return named[0]
    return "float32" if op in OF_PIXELS else None


def shape_of(case: str, op: str, elements: int) -> list[int] | None:
    """Of rows that hold the number of elements alone, in all steps."""
    named = re.search(r"\[([\d, ]+)\]", case)
    if named:
        return [int(size) for size in named[1].split(",")]
    if op in ("session", "training_overhead"):
        return [elements // 64, 1, 8, 8]
    if op not in OF_PIXELS | OF_NETWORKS:
        return None
    if op == "schedulers" and elements == 16 * 3 * 256 * 256:
        return [16, 3, 256, 256]
    steps = re.search(r"trajectory of (\d+)|, (\d+) steps", case)
    count = int(steps[1] or steps[2]) if steps else 1
    if "calc_bpd_loop" in case:
        count = {12_288_000: 250, 19_660_800: 50}.get(elements, 1)
    return [elements // count // math.prod(IMAGE), *IMAGE]


def merged(before: list[Row], now: list[Row]) -> list[Row]:
    """Rows of earlier runs, those of the same case replaced in their places, the others after."""
    new = {row["case"]: row for row in now}
    return [new.pop(row["case"], row) for row in before] + list(new.values())


def current(before: list[Row], ran: set[str], skipped: set[str]) -> list[Row]:
    """What is left of a file after a run of all benchmarks: cases that ran, and those whose
    benchmarks were skipped (of rows that do not name theirs, those of a file of which any was)."""
    files = {test.partition(".py::")[0] for test in skipped}

    def kept(row: Row) -> bool:
        file = f"bench_{FILES.get(row['op'], row['op'])}"
        was_skipped = row["test"] in skipped if row["test"] else file in files
        return row["case"] in ran or was_skipped

    return [row for row in before if kept(row)]


def write(path: Path, report: Report) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    partial.rename(path)


def table(report: Report) -> Iterator[str]:
    """A report as lines of text."""
    yield f"{report['device']}; torch {report['torch']}; {report['backend']}"
    yield f"copy: {report['copy_gigabytes_per_second']:.1f} GB/s"
    found = [normalised(row, report) for row in report["rows"]]
    width = max([34, *(len(row["case"]) + 2 for row in found)])
    yield f"{'case':<{width}}{'µs':>12}{'GB/s':>8}{'% copy':>8}  slower by"
    for row in found:
        if "failed" in row:
            yield f"{row['case']:<{width}}  failed: {row['failed']}"
            continue
        moved = [row.get(key) for key in ("gigabytes_per_second", "percent_of_copy")]
        shown = "".join(f"{'' if number is None else f'{number:.1f}':>8}" for number in moved)
        others = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in row["ratio"].items())
        yield f"{row['case']:<{width}}{row['microseconds'][OURS]:>12.1f}{shown}  {others}"
