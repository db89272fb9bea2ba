"""`make gpu-check` on a machine that has no GPU, and with an nvidia-smi that says there is one."""

from __future__ import annotations

import json
import os
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
