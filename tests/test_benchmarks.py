"""The harness of the benchmarks: what is wrong has no speed, what is not here is said, and rows of
one run join those of others."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comparison
import pytest
import results
import torch
from correctness import WrongResult, agree, like_randn, within
from peers import Missing
from results import OURS

ROOT = Path(__file__).parent.parent
REAL_RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))

# Short: two images, and as many rounds as there have to be. What a test needs besides is put in.
PLUGIN = """
import pytest

def pytest_collection_modifyitems(config, items):
    import comparison
    comparison.host_medians = once
{collected}

def once(candidates, seconds):
    calls = {{name: call() for name, call in candidates.items()}}
    return {{name: 1e-3 * (1 + i) for i, name in enumerate(calls)}}

@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    import comparison
    comparison.QUICK_SIZES["cpu"] = comparison.SIZES["cpu"] = [2]
    comparison.LARGE["cpu"] = 2
    comparison.COMPILED["cpu"] = []
{configured}
"""


def run(
    folder: Path, *arguments: str, collected: str = "", configured: str = ""
) -> subprocess.CompletedProcess[str]:
    """``pytest benchmarks/…`` in a process of its own."""

    def indented(code: str) -> str:
        return "\n".join(f"    {line}" for line in code.splitlines())

    text = PLUGIN.format(collected=indented(collected), configured=indented(configured))
    (folder / "shortened.py").write_text(text)
    folders = [str(ROOT / "benchmarks"), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "shortened", "-p", "no:cacheprovider", "-q",
         "--benchmark-only", "--results", str(folder / "out"), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def rows_of(folder: Path) -> dict[str, dict]:
    (path,) = (folder / "out").glob("*.json")
    return {row["case"]: row for row in results.rows(path)}


def summary(output: str) -> tuple[str, str]:
    """The table, and what is said of what was left out."""
    table, _, left_out = output.partition("medians, and ratios to ddpm_fast")[2].partition(
        "= left out ="
    )
    return table, left_out


PLAIN = "reverse_step float32 [2, 3, 32, 32]"
GUIDED = "reverse_step guidance [2, 3, 32, 32]"
WITH_X0 = "reverse_step x0 output [2, 3, 32, 32]"
LEARNED = "reverse_step learned_range [2, 3, 32, 32]"
OLD = {"case": "randn float32", "elements": 3072, "microseconds": {OURS: 1.0}, "ratio": {}}


def speed(case: str, **more: Any) -> dict[str, Any]:
    return {**OLD, "case": case, "date": "2000-01-01", **more}


def before(folder: Path, rows: list[dict[str, Any]], quick: bool) -> Path:
    """The file of the run to be, which another one left."""
    device = re.sub(r"\d+ threads", "1 threads", comparison.device_name(torch.device("cpu")))
    path = results.path_of(folder / "out", device, quick)
    results.write(path, {"device": device, "quick": quick, "rows": rows})
    return path


# Of one kernel a wrong result, one that crashes, a peer that is wrong, others that are not here.
PLANTED = """
import eager
bench = next(item.module for item in items if "reverse_step" in item.path.name)
right = bench.reverse_step
def wrong(*args, **kwargs):
    if args[1].shape[1] == 6:
        raise RuntimeError("launch failed\\nwhere")
    found = right(*args, **kwargs)
    if "guidance_scale" in kwargs:
        found[-1, -1, -1, -1] += 0.5
    return found
bench.reverse_step = wrong
right_peer = eager.EagerStep.with_x0
def wrong_peer(self, *args):
    x, x0 = right_peer(self, *args)
    return x + 0.05, x0
eager.EagerStep.with_x0 = wrong_peer
"""
WITHOUT = """
import sys
for name in ("diffusers", "denoising_diffusion_pytorch"):
    sys.modules[name] = None
comparison.QUICK_SIZES["cpu"] = [2, 4]
comparison.free_memory = lambda device: 64 * 2 * 3 * 32 * 32
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder and what was printed, of a run of a few cases, right and wrong, after another."""
    folder = tmp_path_factory.mktemp("ran")
    before(folder, [speed(case) for case in (PLAIN, "randn float32", LEARNED)], quick=True)
    files = [f"benchmarks/bench_{of}.py" for of in ("reverse_step", "launch", "schedulers")]
    found = run(
        folder, *files, "--quick", "-k", "bench_float32 or x0 or guidance or learned or launch"
        " or forward", collected=PLANTED, configured=WITHOUT,
    )  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    return folder, found.stdout


def test_a_table_and_its_rows(ran):
    folder, output = ran
    row = rows_of(folder)[PLAIN]
    assert row["op"] == "reverse_step"
    assert row["test"] == "bench_reverse_step.py::bench_float32[(2, 3, 32, 32)]"
    assert row["shape"] == [2, 3, 32, 32]
    assert (row["dtype"], row["elements"], row["bytes"]) == ("float32", 6144, 12 * 6144)
    assert row["quick"]
    assert {"eager", "OpenAI", "reference"} < row["ratio"].keys()
    assert row["microseconds"][OURS] == 1000
    assert row["gigabytes_per_second"] == pytest.approx(12 * 6144 / 1e6, abs=0.01)
    copied = row["copy_gigabytes_per_second"]
    assert row["percent_of_copy"] == pytest.approx(100 * 12 * 6144 / 1e6 / copied, abs=0.1)
    # people read what comes last: after what pytest and its plugins have to say
    table, _ = summary(output)
    assert table.count("\nreverse_step ") == 4
    assert "eager 2.0×" in table
    assert "Legend" not in output
    assert next((folder / "out").iterdir()).name.endswith(".quick.json")


def test_what_is_wrong_has_no_speed(ran):
    """A kernel; and a peer: where it computes something else, a ratio of speeds means nothing; and
    what crashes, whose speed of before goes. Rows of other cases stay with their dates."""
    folder, output = ran
    rows = rows_of(folder)
    assert list(rows) == [PLAIN, "randn float32 [1, 3, 32, 32]", LEARNED, GUIDED, WITH_X0]
    assert rows["randn float32 [1, 3, 32, 32]"]["date"] == "2000-01-01" != rows[PLAIN]["date"]
    assert rows[GUIDED]["failed"] == "wrong result (ddpm_fast: max error 0.5, allowed 1e-05)"
    start = "wrong result (eager: mean of its noise: max error 0."  # of sigma
    assert rows[WITH_X0]["failed"].startswith(start)
    assert rows[LEARNED]["failed"] == "crashed (RuntimeError: launch failed)"
    lines = summary(output)[0].splitlines()
    for case in (GUIDED, WITH_X0, LEARNED):
        assert rows[case]["microseconds"] == rows[case]["ratio"] == {}
        line = next(line for line in lines if line.startswith(case))
        assert line.endswith(f"failed: {rows[case]['failed']}")
        assert "×" not in line
    assert output.count("FAILED benchmarks/bench_reverse_step.py::bench_variants") == 3


def test_what_is_not_here_is_left_out_and_said(ran):
    folder, output = ran
    _, left_out = summary(output)
    for why in (
        r"\nquick: cases that --quick leaves out: \d+ cases",
        r"\ndiffusers is not installed: compared without it: 4 cases",
        r"\ndenoising-diffusion-pytorch is not installed: compared without it: 1 case\n",
        r"\nless than 0\.00079 GB of memory free: sizes from 4 up: 1 case",
    ):
        assert re.search(why, left_out), left_out
    if not torch.cuda.is_available():
        assert "no GPU: 2 cases" in left_out
    assert "diffusers" not in rows_of(folder)[PLAIN]["ratio"]


WHOLE = """
items[:] = [i for i in items if i.path.name in ("bench_randn.py", "bench_launch.py")]
items[:] = [i for i in items if "layouts" not in i.name]
def crash(*args, **kwargs):
    raise OSError("gone")
next(i.module for i in items if "randn" in i.path.name).rule_of = crash
"""


def test_a_whole_run_leaves_no_rows_of_cases_that_are_gone(tmp_path):
    """But of those that it skipped. A crash before there is a row is one of the benchmark's."""
    now, gone = "bench_randn.py::bench_float32[(2, 3, 32, 32)]", "bench_randn.py::bench_gone"
    crashed = "randn float32 [2, 3, 32, 32]"
    old = [speed(crashed, test=now), speed("randn gone", test=gone), speed("host's time a call"),
           speed("sample [1, 3, 8, 8]")]  # fmt: skip
    path = before(tmp_path, old, quick=False)
    found = run(tmp_path, "benchmarks", collected=WHOLE)
    assert found.returncode == 1, found.stdout + found.stderr
    rows = {row["case"]: row for row in results.rows(path)}
    skipped = [] if torch.cuda.is_available() else ["host's time a call"]
    assert [*rows][: 1 + len(skipped)] == [crashed, *skipped]
    assert not {"randn gone [1, 3, 32, 32]", "sample [1, 3, 8, 8]"} & rows.keys()
    assert rows[crashed]["failed"] == "crashed (OSError: gone)"
    assert rows[crashed]["microseconds"] == {}


def test_rows_of_skipped_benchmarks_stay():
    rows = [{"case": str(i), "op": op, "test": test} for i, (op, test) in enumerate([
        ("a", "bench_a.py::x"), ("a", "bench_a.py::y"), ("a", None), ("b", None),
        ("rewrites", None), ("b", "bench_b.py::z"),
    ])]  # fmt: skip
    skipped = {"bench_a.py::x", "bench_sampling.py::x"}
    assert [row["case"] for row in results.current(rows, {"5"}, skipped)] == ["0", "2", "4", "5"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_here():
    spec = importlib.util.spec_from_file_location("_conftest", ROOT / "benchmarks/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    request = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: "cuda"))
    with pytest.raises(pytest.skip.Exception, match="--device cuda: torch finds no GPU"):
        module.device.__wrapped__(request)


def test_no_compiler_is_said(monkeypatch):
    def none() -> None:
        raise RuntimeError("none")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    comparison.why_not_compiled.cache_clear()
    try:
        found = comparison.compiled(abs)
    finally:
        comparison.why_not_compiled.cache_clear()
    assert found == Missing("torch.compile: no C++ compiler (RuntimeError)")


def test_compiled_noise_is_pytorchs(monkeypatch):
    """On a CPU; a GPU's own is fast."""
    given = []
    monkeypatch.setattr(comparison, "why_not_compiled", lambda device_type: "")
    monkeypatch.setattr(torch, "compile", lambda call, **options: given.append(options))
    for device_type in ("cpu", "cuda"):
        comparison.compiled(abs, device_type)
    comparison.compiled_network(torch.nn.Linear(1, 1))
    assert [each.get("options") for each in given] == [
        {"fallback_random": True}, None, {"fallback_random": True}
    ]  # fmt: skip


def test_rows_join_those_of_other_runs():
    before = [{"case": "a", "date": "1"}, {"case": "b", "date": "1"}]
    now = [{"case": "c", "date": "2"}, {"case": "a", "date": "2"}]
    joined = results.merged(before, now)
    assert [(row["case"], row["date"]) for row in joined] == [("a", "2"), ("b", "1"), ("c", "2")]


@pytest.mark.parametrize("path", REAL_RESULTS, ids=lambda path: path.stem)
def test_results_that_are_kept_can_be_read(path):
    report = results.read(path)
    cases = [row["case"] for row in report["rows"]]
    assert len(set(cases)) == len(cases)
    for row in report["rows"]:
        assert {"op", "shape", "dtype", "elements", *results.OF_RUN} <= row.keys()
        assert "failed" in row or OURS in row["microseconds"]
    assert len(list(results.table(report))) == len(cases) + 3


@pytest.mark.parametrize(
    ("case", "elements", "op", "shape", "dtype"),
    [
        ("reverse_step bfloat16 model", 786432, "reverse_step", [256, 3, 32, 32], "float32"),
        ("reverse_step float16", 3072, "reverse_step", [1, 3, 32, 32], "float16"),
        ("scheduler ddpm", 3145728, "schedulers", [16, 3, 256, 256], "float32"),
        ("scheduler ddim trajectory of 4", 12288, "schedulers", [1, 3, 32, 32], "float32"),
        ("lucidrains ddim_sample, 5 steps", 245760, "lucidrains", [16, 3, 32, 32], "float32"),
        ("sampling step, batch 8", 24576, "sampling", [8, 3, 32, 32], None),
        ("OpenAI calc_bpd_loop fixed_large", 12288000, "openai", [16, 3, 32, 32], "float32"),
        ("training step float32", 49152, "denoising_loss", [16, 3, 32, 32], "float32"),
        ("a step in a session, batch 8", 512, "session", [8, 1, 8, 8], None),
    ],
)
def test_rows_of_before_are_completed(case, elements, op, shape, dtype):
    row = results.normalised({"case": case, "elements": elements}, {"date": "2026-01-01"})
    assert (row["op"], row["shape"], row["dtype"]) == (op, shape, dtype)
    assert row["date"] == "2026-01-01"


def test_a_file_that_holds_something_else(tmp_path):
    for text in ("{}", "[", "[]", '{"rows": [3]}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json holds no results"):
            results.read(path)


def test_rules():
    z = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    agree("x", z + 1e-6, z, atol=2e-6)
    like_randn("x", z)
    with pytest.raises(WrongResult, match=r"x: max error 0\.5, allowed 0\.01"):
        agree("x", [z, torch.tensor([1.5])], [z, torch.tensor([1.0])], rtol=0.01)
    with pytest.raises(WrongResult, match="max error nan"):
        agree("x", {"a": z * float("nan")}, {"a": z}, atol=1.0)
    with pytest.raises(WrongResult, match=r"shape \[10000\], not \[1\]"):
        agree("x", z, z[:1], atol=1e9)
    with pytest.raises(WrongResult):
        within("x", float("nan"), 1.0)
    for wrong, what in (
        (z + 0.1, "mean"),
        (1.1 * z, "variance"),
        (z.index_fill(0, z.argmax(), 9), "largest"),
    ):
        with pytest.raises(WrongResult, match=what):
            like_randn("x", wrong)
