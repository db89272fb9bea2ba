"""`make gpu-check` on a machine that has no GPU, and with an nvidia-smi that says there is one."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import no_gpu
from test_build import copy_of_sources, needs_nvcc

ROOT = Path(__file__).parent.parent


def gpu_check(tmp_path: Path, *arguments: str, gpu: str = "", root: Path = ROOT):
    """Runs it with an nvidia-smi that answers ``gpu``, or fails if that is empty."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    answer = f"echo '{gpu}'" if gpu else "exit 9"
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path / "out"), *arguments],
        cwd=root, env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_gpu_nothing_is_written(tmp_path):
    run = gpu_check(tmp_path)
    assert run.returncode == 2
    assert "no NVIDIA GPU here" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["test", "bench"])
def test_a_part_that_could_not_run_has_failed(part, tmp_path):
    """Torch sees no GPU: skipped tests and skipped benchmarks are not what was asked for."""
    run = gpu_check(tmp_path, "--part", part, gpu="NVIDIA H200, 580.1, 9.0")
    assert run.returncode == 1, run.stdout + run.stderr
    report = json.loads((tmp_path / "out" / "NVIDIA-H200.json").read_text())
    assert report["device"] == "NVIDIA H200"
    assert report["driver"] == "580.1"
    assert not report["parts"][part]["ok"]
    assert "rows" not in report["parts"][part]
    table = (tmp_path / "out" / "NVIDIA-H200.txt").read_text()
    assert "FAILED" in table
    assert table.strip() in run.stdout


ROWS = """
{"device": "GPU", "torch": "2", "backend": "b", "copy_gigabytes_per_second": 4000.0, "rows": [
 {"case": "randn", "elements": 3, "microseconds": {"ddpm_fast": 2.0, "eager": 4.0},
  "ratio": {"eager": 2.0}, "gigabytes_per_second": 9.0, "percent_of_copy": 8.5},
 {"case": "host", "elements": 3, "microseconds": {"ddpm_fast": 2.0}, "ratio": {}}],
 "ok": true, "seconds": 1.0}
"""


def test_results_are_shown_without_the_package():
    """As where nothing is installed: only the interpreter's own modules, and the root elsewhere."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_check
report = dict(device="GPU", compute_capability="9.0", driver="1", date="2000-01-01", python="3",
              parts=dict(bench=json.loads({ROWS!r})))
print("\\n".join(gpu_check.lines_of(report)))
print("torch" in sys.modules, "ddpm_fast" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert "copy: 4000.0 GB/s" in run.stdout, run.stderr
    assert "eager 2.0×" in run.stdout
    assert run.stdout.split()[-2:] == ["False", "False"]


def test_groups_of_tests(monkeypatch):
    """Every test of the GPU is in one group and no more; the groups' outcomes are one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    collect = [sys.executable, "-m", "pytest", *gpu_check.GPU_TESTS, "--collect-only", "-q"]
    run = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in run.stdout.splitlines() if "::" in line]
    assert len(names) > 600

    def belongs(name: str, group: str) -> bool:
        """As pytest's -k has it."""
        words = re.sub(r"(?!(?:and|or|not)\b)\b\w+", lambda word: repr(word[0] in name), group)
        return eval(words)

    for name in names:
        assert sum(belongs(name, group) for group in gpu_check.GROUPS) == 1, name

    fine = {"ok": True, "output": "", "passed": 3, "failed": [], "skipped": ["why"]}
    none = {**fine, "passed": 0}
    bad = {**fine, "ok": False, "failed": ["test_x"], "output": "what was wrong"}
    assert gpu_check.merged([fine, none]) == {
        "ok": True, "passed": 3, "failed": [], "skipped": ["why"],
    }  # fmt: skip
    assert not gpu_check.merged([none, none])["ok"]
    found = gpu_check.merged([fine, bad, {"ok": False, "output": "stopped"}])
    assert not found["ok"]
    assert found["failed"] == ["test_x"]
    assert found["output"] == "what was wrong\nstopped"


def test_every_kernel_is_watched(tmp_path, monkeypatch):
    """compute-sanitizer's filters let each through: those of CUDA by their namespace, Triton's by
    their names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho ' --kernel-regex arg'\n")
    tool.chmod(0o755)
    commands, fine = [], {"ok": True, "passed": 1}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "tests", lambda *args: commands.append(args[-1]) or fine)
    gpu_check.sanitize(tmp_path, {})
    filters = [
        value.removeprefix("kns=")
        for option, value in itertools.pairwise(commands[0])
        if option == "--kernel-regex"
    ]
    names = []
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        for definition in path.read_text().split("__global__")[1:]:
            name = re.search(r"(\w+)\(const __grid_constant__", definition)
            spaces = path.read_text().partition("__global__")[0]
            spaces = re.findall(r"^namespace (\w+) {$", spaces, re.M)
            names.append("_ZN" + "".join(f"{len(part)}{part}" for part in [*spaces, name[1]]))
    for path in (ROOT / "kernels").glob("*.py"):
        names += re.findall(r"^ +(\w+)\[.+\]\($", path.read_text(), re.M)
    assert len(names) >= 20
    for name in names:
        assert any(part in name for part in filters), name


def test_what_takes_too_long_is_stopped_whole(monkeypatch):
    """The process that was started, and those that it has started."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    result = gpu_check.execute(["sh", "-c", "sleep 54.321 & echo begun; wait"], 0.5)
    assert not result["ok"]
    assert "begun" in result["output"]
    assert "stopped after" in result["output"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 54.321" not in running


def test_parts_join_those_before(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    gpu = {"name": "GPU", "driver_version": "1", "compute_cap": "9.0"}
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: gpu)
    for part in ("build", "test"):
        monkeypatch.setitem(gpu_check.PARTS, part, lambda *_: {"ok": True})
        monkeypatch.setattr(sys, "argv", ["gpu-check", "--out", str(tmp_path), "--part", part])
        assert gpu_check.main() == 0
    report = json.loads((tmp_path / "GPU.json").read_text())
    assert list(report["parts"]) == ["build", "test"]
    gpu["driver_version"] = "2"
    assert gpu_check.main() == 0
    assert list(json.loads((tmp_path / "GPU.json").read_text())["parts"]) == ["test"]


@pytest.mark.slow
def test_build_for_the_gpu_that_is_there(tmp_path):
    needs_nvcc()
    pytest.importorskip("cmake")
    source = copy_of_sources(tmp_path)
    run = gpu_check(tmp_path, "--part", "build", gpu="NVIDIA H200, 580.1, 9.0", root=source)
    assert run.returncode == 0, run.stdout + run.stderr
    code = "import torch; from ddpm_fast import _native; print(*_native.cuda.targets)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert shown.stdout.split() == ["sm_90", "compute_90"], shown.stderr
