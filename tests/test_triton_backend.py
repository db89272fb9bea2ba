"""When Triton's kernels are taken, and what is said when they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from fake_gpus import FakeCuda
from helpers import no_gpu

from ddpm_fast import NoiseSchedule, Sampler, add_noise, backends, randn, use_backend
from ddpm_fast.backends import select, triton_launcher
from ddpm_fast.kernels import support

backends_module = import_module("ddpm_fast.backends")
GPU = torch.device("cuda:0")


def python(code: str, **environment: str) -> list[str]:
    """What a fresh interpreter prints, with Triton as it comes."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env={**kept, **environment}, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture
def compiling(gpus, monkeypatch):
    """compiling(cuda, capability): GPUs, and a Triton with a driver for them."""
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    from triton.runtime import driver

    def install(cuda, capability=(9, 0)):
        gpus(cuda, capability, interpreted=False)
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: "a GPU"))

    return install


def test_taken_where_there_are_no_cuda_kernels(compiling):
    compiling(None)
    assert select(GPU) == "triton"
    status = backends()["triton"]
    assert status.available
    assert f"NVIDIA H200, NVIDIA H200; Triton {support.triton_version()}" in str(status)
    with use_backend("triton"):
        assert select(torch.device("cuda:1")) == "triton"
        with pytest.raises(RuntimeError, match="'triton' takes CUDA tensors; got one on cpu"):
            select(torch.device("cpu"))


def test_cuda_comes_first(compiling):
    compiling(FakeCuda())
    assert select(GPU) == "cuda"
    with use_backend("triton"):
        assert select(GPU) == "triton"
    compiling(FakeCuda(targets=("sm_80",)))  # built for other GPUs
    assert select(GPU) == "triton"


def test_on_amds_gpus(compiling, monkeypatch):
    """Where torch's "cuda" is ROCm the CUDA kernels say so, and Triton's run."""
    compiling(FakeCuda(), capability=(7, 0))  # which says nothing of these
    monkeypatch.setattr(torch.version, "hip", "6.4")
    backends_module._cuda_problem.cache_clear()
    assert "is for AMD's GPUs, and these kernels for NVIDIA's" in str(backends()["cuda"])
    assert select(GPU) == "triton"


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_a_gpu_that_triton_does_not_support(capability, compiling):
    compiling(None, capability)
    reason = r"NVIDIA H200, has compute capability \d\.\d, and Triton compiles for 8.0 or later"
    assert not backends()["triton"].available
    with pytest.raises(RuntimeError, match=f"'triton' cannot run here: .*{reason}"):
        backends_module.require("triton")
    with pytest.raises(
        RuntimeError, match=f"cuda:0: cuda: installed without .*; triton: .*{reason}"
    ):
        select(GPU)


def test_a_driver_that_does_not_load(compiling, monkeypatch):
    """As without a C compiler, with which Triton makes its part of the driver."""
    compiling(None)
    from triton.runtime import driver

    def fail():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=fail))
    assert "Triton finds no driver for NVIDIA H200: Failed to find C compiler" in str(
        backends()["triton"]
    )


def test_the_interpreter_by_accident(gpus):
    """TRITON_INTERPRET with tensors on a GPU: nobody waits for an interpreter unawares."""
    gpus(None)
    reason = "TRITON_INTERPRET is set, with which Triton interprets kernels on the host"
    status = backends()["triton"]
    assert not status.available
    assert reason in status.detail
    with pytest.raises(RuntimeError, match=f"'triton' cannot run here: {reason}"):
        backends_module.require("triton")
    with pytest.raises(RuntimeError, match=f"cuda:0: cuda: installed .*; triton: {reason}"):
        select(GPU)
    token = backends_module._chosen.set("triton")
    try:
        with pytest.raises(RuntimeError, match=f"'triton' cannot run on cuda:0: {reason}"):
            select(GPU)
    finally:
        backends_module._chosen.reset(token)


def test_a_launch_on_another_gpu_than_the_current(entered, monkeypatch):
    launched = []
    monkeypatch.setattr(backends_module, "_import_launcher", lambda op: launched.append)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    for index in (0, 1):
        triton_launcher("randn", torch.device("cuda", index))(index)
    assert launched == [0, 1]
    assert entered == [1, "left"]


REPORT = """
    import ddpm_fast
    print(ddpm_fast.backends()["triton"])
    try:
        with ddpm_fast.use_backend("triton"): pass
    except RuntimeError as error:
        print(error)
"""


def test_without_triton():
    lines = python('import sys\nsys.modules["triton"] = None' + textwrap.dedent(REPORT))
    assert lines[0].split()[:2] == ["triton", "no"]
    assert "Triton is not installed; torch's builds for GPUs bring it from torch 2.9 on" in lines[0]
    assert "backend 'triton' cannot run here: Triton is not installed" in lines[1]


def test_a_triton_that_is_too_old_or_broken():
    fake = 'import sys, types\nsys.modules["triton"] = types.ModuleType("triton")\n'
    old = python(fake + 'sys.modules["triton"].__version__ = "2.1.0"' + textwrap.dedent(REPORT))
    assert "Triton 2.1.0 is too old: the kernels need 3.5" in old[0]
    broken = """
        import sys
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "triton":
                    raise ImportError("libcuda.so.1: cannot open shared object file")
        sys.meta_path.insert(0, Broken())
    """
    lines = python(textwrap.dedent(broken) + textwrap.dedent(REPORT))
    assert "Triton failed to load: libcuda.so.1: cannot open" in lines[0]


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_without_a_gpu():
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    lines = python(REPORT)
    assert lines[0].split()[:2] == ["triton", "no"]
    assert "torch" in lines[0]
    assert lines[1] == f"backend 'triton' cannot run here: {lines[0].split(maxsplit=2)[2]}"


def test_a_whole_engine_without_the_native_module():
    """As installed with DDPM_FAST_NATIVE=0: every op by Triton, here interpreted."""
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    code = """
        import sys, warnings
        sys.modules["ddpm_fast._native"] = None
        warnings.simplefilter("error")
        import torch
        from ddpm_fast import *
        schedule = NoiseSchedule.cosine(20)
        with use_backend("triton"):
            x = randn([2, 3, 8, 8], seed=1)
            x_t = add_noise(x, torch.tensor([3, 4]), schedule, seed=1)
        sampler = Sampler(lambda x, t: x, schedule, backend="triton")
        for result in (x, x_t, sampler.sample([2, 3, 8, 8], seed=1)):
            print(result.double().square().sum().item())
    """
    found = [float(line) for line in python(code, TRITON_INTERPRET="1")]
    schedule, x = NoiseSchedule.cosine(20), randn([2, 3, 8, 8], seed=1)
    x_t = add_noise(x, torch.tensor([3, 4]), schedule, seed=1)
    sampled = Sampler(lambda x, t: x, schedule).sample([2, 3, 8, 8], seed=1)
    expected = [result.double().square().sum().item() for result in (x, x_t, sampled)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_versions():
    assert support.version_of("3.6.0") == (3, 6, 0)
    assert support.version_of("3.10.0+git1234") == (3, 10, 0)
    assert support.version_of("3.10.0") >= support.OLDEST > support.version_of("3.4.0")
    assert support.version_of("unknown") == ()


def test_interpreted_or_compiled_is_settled_once():
    """Whatever becomes of the variable after the first question."""
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    code = """
        import os
        from ddpm_fast.kernels import support
        print(support.interpreted())
        os.environ["TRITON_INTERPRET"] = CHANGED
        from ddpm_fast.kernels.reverse_step import reverse_step_tile_kernel as kernel
        print(support.interpreted(), type(kernel).__name__)
    """
    assert python(code.replace("CHANGED", "'1'")) == ["False", "False JITFunction"]
    interpreted = python(code.replace("CHANGED", "'0'"), TRITON_INTERPRET="1")
    assert interpreted == ["True", "True InterpretedFunction"]
