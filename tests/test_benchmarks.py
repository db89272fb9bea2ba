"""The harness of the benchmarks: what is wrong has no speed, what is not here is said, and rows of
one run join those of others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import results
import torch
from correctness import WrongResult, agree, like_randn, within
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
OLD = {"case": "randn float32", "elements": 3072, "microseconds": {OURS: 1.0}, "ratio": {}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder and what was printed, of a run of two cases and two that only GPUs have."""
    folder = tmp_path_factory.mktemp("ran")
    found = run(
        folder, "benchmarks/bench_reverse_step.py", "benchmarks/bench_launch.py", "--quick",
        "-k", "bench_float32 or x0 or launch",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return folder, found.stdout


def test_a_table_and_its_rows(ran):
    folder, output = ran
    rows = rows_of(folder)
    row = rows[PLAIN]
    assert row["op"] == "reverse_step"
    assert row["shape"] == [2, 3, 32, 32]
    assert (row["dtype"], row["elements"], row["bytes"]) == ("float32", 6144, 12 * 6144)
    assert row["quick"]
    assert {"eager", "OpenAI", "reference"} < row["ratio"].keys()
    assert row["microseconds"][OURS] == 1000
    assert row["gigabytes_per_second"] == pytest.approx(12 * 6144 / 1e6, abs=0.01)
    copied = row["copy_gigabytes_per_second"]
    assert row["percent_of_copy"] == pytest.approx(100 * 12 * 6144 / 1e6 / copied, abs=0.1)
    # people read what comes last: after what pytest and its plugins have to say
    table, left_out = summary(output)
    assert table.count("\nreverse_step ") == 2
    assert "eager 2.0×" in table
    assert "Legend" not in output
    assert "quick: cases that --quick leaves out: 1 case" in left_out
    if not torch.cuda.is_available():
        assert "no GPU: 2 cases" in left_out
    assert next((folder / "out").iterdir()).name.endswith(".quick.json")


WRONG = """
import eager, sys
bench = next(item.module for item in items)
right = bench.reverse_step
def wrong(*args, **kwargs):
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


def test_what_is_wrong_has_no_speed(ran):
    """A kernel; and a peer: where it computes something else, a ratio of speeds means nothing. And
    rows of the same case give way, others stay with their dates, also rows of another schema."""
    folder, _ = ran
    (path,) = (folder / "out").glob("*.json")
    before = path.read_text()
    report = json.loads(before)
    report["rows"][0]["date"] = "2000-01-01"
    path.write_text(json.dumps(report | {"rows": [*report["rows"], OLD]}))
    found = run(
        folder, "benchmarks/bench_reverse_step.py", "--quick", "-k", "guidance or x0",
        collected=WRONG,
    )  # fmt: skip
    rows = rows_of(folder)
    path.write_text(before)
    assert found.returncode == 1, found.stdout + found.stderr
    assert list(rows) == [PLAIN, WITH_X0, "randn float32 [1, 3, 32, 32]", GUIDED]
    assert rows[PLAIN]["date"] == "2000-01-01" != rows[GUIDED]["date"]
    assert rows[GUIDED]["failed"] == "wrong result (ddpm_fast: max error 0.5, allowed 1e-05)"
    start = "wrong result (eager: mean of its noise: max error 0."  # of sigma
    assert rows[WITH_X0]["failed"].startswith(start)
    lines = summary(found.stdout)[0].splitlines()
    for case in (GUIDED, WITH_X0):
        assert rows[case]["microseconds"] == rows[case]["ratio"] == {}
        line = next(line for line in lines if line.startswith(case))
        assert line.endswith(f"failed: {rows[case]['failed']}")
        assert "×" not in line
    assert found.stdout.count("FAILED benchmarks/bench_reverse_step.py::bench_variants") == 2


WITHOUT = """
import sys
for name in ("diffusers", "denoising_diffusion_pytorch"):
    sys.modules[name] = None
import torch._inductor.cpp_builder as builder
def get_cpp_compiler():
    raise RuntimeError("none")
builder.get_cpp_compiler = get_cpp_compiler
comparison.free_memory = lambda device: 1000
"""


def test_what_is_not_here_is_left_out_and_said(tmp_path):
    files = [f"benchmarks/bench_{of}.py" for of in ("schedulers", "lucidrains", "reverse_step")]
    found = run(tmp_path, *files, "-k", "not low_precision", configured=WITHOUT)
    assert found.returncode == 0, found.stdout + found.stderr
    _, left_out = summary(found.stdout)
    for why in (
        r"\ndiffusers is not installed: \d+ cases",
        r"\ndenoising-diffusion-pytorch is not installed: \d+ cases",
        r"\ndiffusers is not installed: compared without it: 5 cases",
        r"\ntorch.compile: no C\+\+ compiler \(RuntimeError\): compared without it: 4 cases",
        r"\nless than 0\.00039 GB of memory free: sizes from 2 up: 1 case",
    ):
        assert re.search(why, left_out), left_out
    rows = rows_of(tmp_path)
    assert len(rows) == 5
    assert rows[GUIDED]["ratio"].keys() == {"our plain step", "eager"}
    assert not rows[GUIDED]["quick"]
    assert not list((tmp_path / "out").glob("*.quick.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_here(tmp_path):
    found = run(tmp_path, "benchmarks/bench_randn.py", "--device", "cuda")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "--device cuda: torch finds no GPU: " in found.stdout.partition("= left out =")[2]
    assert not (tmp_path / "out").exists()


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
