"""Benchmarks that compare: every candidate of a case is checked first, then timed in turn within
one run, and the medians are set against each other. ``--device cuda`` measures on a GPU,
``--quick`` takes fewer rounds, sizes and cases, ``--results DIR`` keeps the rows in a JSON named
after the device (results.py). What was left out is said at the end; what failed, wrong results and
crashes, has a row without a speed. A whole run, of all benchmarks, drops rows that none of them
has any more."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import (
    LARGE,
    QUICK_SIZES,
    SIZES,
    device_name,
    medians,
    preferring,
    short_of_memory,
)
from correctness import WrongResult
from peers import Missing
from results import OURS, current, merged, path_of, read, table, with_shape, write

import ddpm_fast
from ddpm_fast.backends import select

ROWS = pytest.StashKey[list[dict[str, Any]]]()
BANDWIDTH = pytest.StashKey[float]()
LEFT_OUT = pytest.StashKey[collections.Counter[str]]()
SKIPPED = pytest.StashKey[set[str]]()  # tests, as rows name them
NARROWED = pytest.StashKey[bool]()
STARTED = pytest.StashKey[dict[str, Any]]()  # of a test: the row that it is at
FAILED = pytest.StashKey[bool]()  # of a test: it has a row that says so
QUICK = "quick: cases that --quick leaves out"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer rounds, sizes and cases")
    parser.addoption("--results", type=Path, help="folder for a JSON file named after the device")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="what is measured")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that --quick leaves out")
    config.stash[ROWS] = []
    config.stash[LEFT_OUT] = collections.Counter()
    config.stash[SKIPPED] = set()
    config.stash[NARROWED] = False
    # torch.compile's own code calls what torch has deprecated: nothing that a reader could mend.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")
    # Its table has one of the candidates alone; --benchmark-verbose shows it all the same.
    config.option.benchmark_quiet = True


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.stash[LEFT_OUT][QUICK] += len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items[:1]:
        item.config.stash[NARROWED] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.excinfo is None:
        return report
    if report.skipped:
        item.config.stash[LEFT_OUT][str(call.excinfo.value)] += 1
        item.config.stash[SKIPPED].add(name_of(item))
    elif report.failed and not item.stash.get(FAILED, False) and BANDWIDTH in item.config.stash:
        item.stash[FAILED] = True
        add_crash(item, first_line(call.excinfo.value))
    return report


def name_of(item: pytest.Item) -> str:
    """As rows say which benchmark they are of."""
    return f"{item.path.name}::{item.name}"


def first_line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


def add_crash(item: pytest.Item, error: str) -> None:
    """Of the row that the test was at; of those that it left in another run; or of the test."""
    measured = {row["case"] for row in item.config.stash[ROWS]}
    started = item.stash.get(STARTED, None)
    rows = [started] if started else [r for r in earlier(item.config) if r["test"] == name_of(item)]
    op = item.path.stem.removeprefix("bench_")
    of_test = {"op": op, "case": f"{op} {item.name}", "shape": None, "dtype": None}
    of_test |= {"elements": None, "test": name_of(item)}
    known = ("op", "case", "shape", "dtype", "elements", "test")
    for row in [row for row in rows if row["case"] not in measured] or [of_test]:
        add_failure(item.config, {key: row[key] for key in known}, f"crashed ({error})")


def add_failure(config: pytest.Config, row: dict[str, Any], why: str) -> None:
    without = {"bytes": None, "flops": None, "microseconds": {}, "ratio": {}, "failed": why}
    add_row(config, without | row)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a whole run: rows of cases that are no more."""
    config = session.config
    if config.stash[ROWS] and int(exitstatus) in (0, 1) and whole_run(session):
        path = results_path(config)
        if path is not None and path.exists():
            ran = {row["case"] for row in config.stash[ROWS]}
            report = read(path)
            write(path, report | {"rows": current(report["rows"], ran, config.stash[SKIPPED])})


def whole_run(session: pytest.Session) -> bool:
    """All of the benchmarks were collected, and each came to its turn."""
    config = session.config
    asked = {Path(config.invocation_params.dir, arg).resolve() for arg in config.args}
    narrowing = ("quick", "keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")
    return (
        asked == {Path(__file__).parent.resolve()}
        and not any(config.getoption(name, None) for name in narrowing)
        and not (config.stash[NARROWED] or session.shouldfail or session.shouldstop)
        and not config.getoption("continue_on_collection_errors")
    )


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """What --device says; on a GPU the CUDA or Triton kernels must run."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        if not gpu_here():
            pytest.skip("--device cuda: torch finds no GPU")
        device = torch.device("cuda", torch.cuda.current_device())
    select(device)  # raises where no kernels run there
    return device


def gpu_here() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("of GPUs: run with --device cuda" if gpu_here() else "no GPU")
    return device


@pytest.fixture
def size(request: pytest.FixtureRequest, device: torch.device) -> tuple[int, ...]:
    """[N, 3, 32, 32], where there is room for it, for what plain PyTorch makes of it and for the
    same in float64."""
    shape: tuple[int, ...] = request.param
    why = short_of_memory(device, 4 * 16 * math.prod(shape))
    if why:
        pytest.skip(f"{why}: sizes from {shape[0]} up")
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
Rule = Callable[[str, Callable[[], Any]], None]


class Case:
    """A row as it becomes one."""

    def __init__(self, request: pytest.FixtureRequest, bandwidth: float) -> None:
        self._config, self._bandwidth, self._test = request.config, bandwidth, request.node
        self._op = request.path.stem.removeprefix("bench_")

    def running(self, candidates: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """Those that are here; the others are left out, and that is said."""
        for candidate in candidates.values():
            if isinstance(candidate, Missing):
                self._config.stash[LEFT_OUT][f"{candidate.why}: compared without it"] += 1
        return {name: c for name, c in candidates.items() if not isinstance(c, Missing)}

    def start(
        self, case: str, state: torch.Tensor | None, calls: int = 1, **more: Any
    ) -> dict[str, Any]:
        shape = None if state is None else list(state.shape)
        dtype = None if state is None else str(state.dtype).removeprefix("torch.")
        op = more.pop("op", self._op)
        row = {
            "op": op,
            "case": with_shape(case, shape, op),
            "shape": shape,
            "dtype": dtype,
            "elements": None if state is None else calls * state.numel(),
            "test": name_of(self._test),
            **more,
        }
        self._test.stash[STARTED] = row
        return row

    @contextlib.contextmanager
    def checked(self, row: dict[str, Any]) -> Iterator[None]:
        """A wrong result is a failure, not a speed."""
        try:
            yield
        except AssertionError as error:
            said = str(error).strip() if isinstance(error, WrongResult) else shown(error)
            self._test.stash[FAILED] = True
            add_failure(self._config, row, f"wrong result ({said})")
            pytest.fail(f"{row['case']}: wrong result ({said})", pytrace=False)

    def finish(self, row: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        ours = seconds[OURS]
        row |= {
            "microseconds": {name: round(1e6 * s, 2) for name, s in seconds.items()},
            "ratio": {name: round(s / ours, 2) for name, s in seconds.items() if name != OURS},
        }
        if row.get("bytes") is not None:
            row["gigabytes_per_second"] = round(row["bytes"] / ours / 1e9, 2)
            row["percent_of_copy"] = round(100 * row["bytes"] / ours / self._bandwidth, 1)
        add_row(self._config, row)
        return row


def shown(error: AssertionError) -> str:
    """The greatest difference that torch.testing names, or the first line."""
    lines = [line.strip() for line in str(error).splitlines()] or ["assertion failed"]
    return next((line for line in lines if line.startswith("Greatest absolute")), lines[0])


@pytest.fixture
def compare(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, copy_bandwidth: float
) -> Compare:
    """compare(case, state, bytes_moved, candidates, check) → seconds a call, by name.

    ``check`` is of the case, run on each of our backends; ``rule(name, call)`` of what a candidate
    returns. ``calls``: of the op within one. The others are the row's own (results.py).
    """
    quick = request.config.getoption("--quick")
    building = Case(request, copy_bandwidth)

    def run(
        case: str,
        state: torch.Tensor,
        bytes_moved: int | None,
        candidates: dict[str, Callable[[], object] | Missing],
        check: Callable[[], None] | None = None,
        *,
        rule: Rule | None = None,
        seconds: float = 1.2,
        calls: int = 1,
        **more: Any,
    ) -> dict[str, float]:
        assert check or rule, f"{case} is not checked"
        row = building.start(case, state, calls, bytes=bytes_moved, **{"flops": None} | more)
        running = building.running(candidates)
        with building.checked(row):
            for name in running if check else ():
                if name.startswith(OURS):
                    with preferring(name.removeprefix(OURS).strip()):
                        check()
            torch.manual_seed(0)
            with torch.inference_mode():
                for name, call in running.items() if rule else ():
                    rule(name, call)
        with torch.inference_mode():
            on_gpu = device.type == "cuda"
            limit = 0.3 if quick else min(seconds, 1.0) if on_gpu else seconds
            found = medians(running, limit, device)

            def once() -> None:
                running[OURS]()
                if on_gpu:
                    torch.cuda.synchronize()

            benchmark.pedantic(once, rounds=5, iterations=5, warmup_rounds=1)
        benchmark.extra_info.update(building.finish(row, found))
        return found

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, copy_bandwidth: float) -> Record:
    """record(case, state, rounds, **more): rounds of seconds by name, measured by the case itself,
    which it has checked ``with record.checking(case, state)``, and what else is to be known."""
    building = Case(request, copy_bandwidth)

    def run(
        case: str,
        state: torch.Tensor | None,
        rounds: list[dict[str, float]],
        calls: int = 1,
        **more: Any,
    ) -> None:
        seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        benchmark.pedantic(lambda: None)  # the figures are the case's own
        row = building.start(case, state, calls, **{"bytes": None, "flops": None} | more)
        benchmark.extra_info.update(building.finish(row, seconds))

    # functions have attributes, of which mypy knows nothing
    run.checking = lambda *args, **more: building.checked(building.start(*args, **more))  # type: ignore[attr-defined]
    run.running = building.running  # type: ignore[attr-defined]
    return run


def add_row(config: pytest.Config, row: dict[str, Any]) -> None:
    """Keeps a row, in --results too: it is there if a later case takes the run down."""
    cases = [other["case"] for other in config.stash[ROWS]]
    assert row["case"] not in cases, f"two cases are called {row['case']!r}"
    report = report_of(config)
    path = results_path(config)
    of_run = ("date", "torch", "ddpm_fast", "quick", "copy_gigabytes_per_second")
    config.stash[ROWS].append(row | {key: report[key] for key in of_run})
    if path is not None:
        write(path, report | {"rows": merged(earlier(config), config.stash[ROWS])})


def results_path(config: pytest.Config) -> Path | None:
    """Of --results, the device's file."""
    folder = config.getoption("--results")
    device = torch.device(config.getoption("--device"))
    return folder and path_of(folder, device_name(device), config.getoption("--quick"))


def earlier(config: pytest.Config) -> list[dict[str, Any]]:
    """The rows of that file."""
    path = results_path(config)
    return read(path)["rows"] if path is not None and path.exists() else []


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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Any:
    """After all that pytest has to say: people read what comes last."""
    result = yield
    if config.stash[ROWS]:
        terminalreporter.section("medians, and ratios to ddpm_fast (measured in turn)")
        for line in table(report_of(config)):
            terminalreporter.write_line(line)
    if config.stash[LEFT_OUT]:
        terminalreporter.section("left out")
        for reason, count in config.stash[LEFT_OUT].items():
            terminalreporter.write_line(f"{reason}: {count} case{'s' * (count > 1)}")
    return result
