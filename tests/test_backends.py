"""Which backend runs, and what is said when one cannot; threads and the OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
from fake_gpus import FakeCuda
from helpers import no_gpu

import ddpm_fast
from ddpm_fast import NoiseSchedule, add_noise, backends, randn, use_backend
from ddpm_fast.backends import driver_problem, kernel_of, native, select, target_problem

backends_module = import_module("ddpm_fast.backends")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_status_of_each():
    statuses = backends()
    assert list(statuses) == ["reference", "cpu", "cuda", "triton"]
    assert statuses["reference"].available
    for status in statuses.values():
        assert status.detail
        assert status.name in str(statuses)
    if statuses["cpu"].available:
        assert native.isa() in statuses["cpu"].detail


def test_selection():
    cpu = torch.device("cpu")
    assert select(cpu) == "cpu"
    with use_backend("reference"):
        assert select(cpu) == "reference"
        with use_backend("auto"):
            assert select(cpu) == "cpu"
        assert select(cpu) == "reference"
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="takes CPU tensors; got one on meta"),
    ):
        select(torch.device("meta"))


def test_no_kernels_for_a_device_is_an_error_not_a_fallback():
    """Meta tensors stand in for any device without kernels; the message says what to do."""
    with pytest.raises(RuntimeError, match=r"no ddpm_fast kernels for meta.*BACKEND=reference"):
        select(torch.device("meta"))


def test_unknown_and_unavailable_names():
    with pytest.raises(ValueError, match="backend must be one of 'auto'"), use_backend("gpu"):
        pass
    for name, status in backends().items():
        if not status.available:
            with pytest.raises(RuntimeError, match=f"'{name}' cannot run here"), use_backend(name):
                pass


def test_environment_chooses():
    code = """
        import torch, ddpm_fast
        from ddpm_fast.backends import select
        print(select(torch.device("cpu")), ddpm_fast.randn([1, 2], seed=0).sum().item())
    """
    fast, slow = python(code), python(code, DDPM_FAST_BACKEND="reference")
    assert fast.stdout.split()[0] == "cpu", fast.stderr
    assert slow.stdout.split()[0] == "reference"
    assert fast.stdout.split()[1] == slow.stdout.split()[1]
    wrong = python(code, DDPM_FAST_BACKEND="gpu")
    assert "backend must be one of 'auto'" in wrong.stderr


def test_environment_chooses_the_instruction_set():
    code = "import ddpm_fast; print(ddpm_fast.backends()['cpu'].detail)"
    assert python(code, DDPM_FAST_CPU_ISA="portable").stdout.startswith("portable")
    assert (
        "DDPM_FAST_CPU_ISA: instruction set 'mmx'" in python(code, DDPM_FAST_CPU_ISA="mmx").stderr
    )


def test_without_compiled_kernels():
    """As after DDPM_FAST_NATIVE=0: one warning, then the reference; "cpu" is refused."""
    code = """
        import sys, warnings
        sys.modules["ddpm_fast._native"] = None
        warnings.simplefilter("always")
        import ddpm_fast
        print(ddpm_fast.randn([1, 4], seed=1).sum().item())
        ddpm_fast.randn([1, 4], seed=1)
        print(ddpm_fast.backends()["cpu"])
        try:
            with ddpm_fast.use_backend("cpu"): pass
        except RuntimeError as error:
            print(error)
    """
    run = python(code)
    lines = run.stdout.splitlines()
    assert float(lines[0]) == randn([1, 4], seed=1).sum().item()
    assert run.stderr.count("slow reference implementation") == 1
    assert lines[1].split()[1] == "no"
    assert "reinstall with a C++ compiler" in lines[2]


def test_importing_needs_torch_and_numpy_only():
    """In an environment that has torch, numpy, what torch itself requires, and nothing else."""
    code = """
        import sys
        from importlib.metadata import requires
        import re
        of_torch = {re.match(r"[A-Za-z0-9_]+", r.replace("-", "_"))[0].lower()
                    for r in requires("torch") if "extra ==" not in r}
        allowed = set(sys.stdlib_module_names) | of_torch | {"ddpm_fast", "torch", "torchgen",
                   "numpy", "mpmath", "markupsafe", "functorch"}

        class Nothing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0].lower() not in allowed:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Nothing())
        import ddpm_fast
        print(ddpm_fast.randn([1, 2], seed=0).shape)
        try:
            import safetensors
        except ModuleNotFoundError:
            print("ok")
    """
    run = python(code)
    assert run.stdout.split()[-1:] == ["ok"], run.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps (Linux)")
def test_one_openmp_runtime():
    code = """
        import ddpm_fast, re
        ddpm_fast.randn([4, 100_000], seed=0)
        paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print(sorted(p for p in paths if re.search(r"lib(g|i|)omp", p)))
    """
    runtimes = eval(python(code).stdout)
    assert len(runtimes) == 1, runtimes


def test_threads_follow_torch():
    """set_num_threads reaches the kernels: threads alive after a call that is worth sharing."""
    if not native.openmp:
        pytest.skip("built without OpenMP")
    code = """
        import os, sys, torch, ddpm_fast
        torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT)
        before = len(os.listdir("/proc/self/task"))
        ddpm_fast.randn([8, 1_000_000], seed=0)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    for count in (1, 3):
        run = python(code.replace("COUNT", str(count)))
        assert int(run.stdout) == count - 1, run.stderr


def test_several_python_threads_draw_the_same_bits():
    from concurrent.futures import ThreadPoolExecutor

    expected = randn([4, 250_000], seed=3)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: randn([4, 250_000], seed=3), range(8)))
    assert all(torch.equal(result, expected) for result in results)


def test_backend_choice_is_per_thread():
    from concurrent.futures import ThreadPoolExecutor

    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(select, torch.device("cpu")).result() == "cpu"


def test_public_names():
    for name in ddpm_fast.__all__:
        assert getattr(ddpm_fast, name) is not None
    schedule = NoiseSchedule.linear()
    assert add_noise(torch.zeros(1, 2), 0, schedule, seed=0).shape == (1, 2)


def test_gpus_that_can_run_the_kernels(gpus):
    gpus(FakeCuda())
    status = backends_module._cuda_status()
    assert status.available
    assert "NVIDIA H200, NVIDIA H200; built for sm_90, compute_90; driver for CUDA 13.0" in str(
        status
    )
    assert select(torch.device("cuda:1")) == "cuda"
    with use_backend("cuda"):
        assert select(torch.device("cuda:0")) == "cuda"
        with pytest.raises(RuntimeError, match="'cuda' takes CUDA tensors; got one on cpu"):
            select(torch.device("cpu"))


def test_a_kernel_gets_its_device_and_its_stream(gpus, entered):
    """On a GPU that is not the current one it is made that for the launch."""
    cuda = FakeCuda()
    gpus(cuda)
    for index in (0, 1):
        run, where = kernel_of("randn", "cuda", torch.device("cuda", index))
        run("arguments", *where)
    assert cuda.calls == [("arguments", 0, 70), ("arguments", 1, 71)]
    assert entered == [1, "left"]


@pytest.mark.parametrize(
    ("cuda", "capability", "message"),
    [
        (None, (9, 0), "installed without the CUDA kernels .* DDPM_FAST_CUDA=ON"),
        (FakeCuda(driver=0), (9, 0), "no NVIDIA driver was found"),
        (FakeCuda(driver=12_080), (9, 0), "driver is too old: it runs CUDA 12.8 at most.*13.0"),
        (
            FakeCuda(targets=("sm_90", "compute_90")),
            (8, 6),
            'compute capability 8.6.*built for sm_90, compute_90.*DDPM_FAST_CUDA_ARCHS="86"',
        ),
    ],
)
def test_gpus_that_cannot(cuda, capability, message, gpus):
    """Asked for or chosen: never another backend in silence, and the reason in the message."""
    gpus(cuda, capability)
    assert not backends_module._cuda_status().available
    with pytest.raises(RuntimeError, match=f"no ddpm_fast kernels for cuda:0: cuda: .*{message}"):
        select(torch.device("cuda:0"))
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run here: .*{message}"):
        backends_module.require("cuda")
    with use_backend("reference"):
        assert select(torch.device("cuda:0")) == "reference"


def test_ptx_needs_a_driver_as_new_as_the_compiler(gpus):
    """Machine code of another GPU, and PTX that the driver could compile if it were newer."""
    for built, capability, runs in (
        (("sm_80", "compute_80"), (8, 0), True),
        (("sm_80", "compute_80"), (9, 0), False),
    ):
        cuda = FakeCuda(driver=13_000, targets=built)
        cuda.runtime_version = lambda: 13_010
        gpus(cuda, capability)
        assert (backends_module.device_problem(0) == "") == runs
    with pytest.raises(RuntimeError, match=r"capability 9\.0.* PTX of CUDA 13\.1.*ARCHS=\"90\""):
        select(torch.device("cuda:0"))


def test_drivers():
    assert driver_problem(13_000, 13_000) == ""
    assert driver_problem(12_020, 12_080) == ""  # minor versions are compatible
    assert driver_problem(13_010, 12_080) == ""
    assert "reinstall with an nvcc of CUDA 12" in driver_problem(12_080, 13_000)


def test_targets():
    built = ["sm_80", "sm_90", "compute_90"]
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)):
        assert target_problem(capability, built) == ""
    assert "compute capability 7.5, and the kernels need 8.0 or later" in target_problem(
        (7, 5), built
    )
    assert target_problem((8, 6), ["sm_86"]) == ""
    assert target_problem((8, 0), ["sm_86"]) != ""  # machine code of a later minor version
    assert target_problem((9, 0), ["sm_80"]) != ""  # of another major version
    assert target_problem((9, 0), ["compute_80"]) == ""
    assert target_problem((9, 0), ["sm_90a"]) == ""
    assert target_problem((10, 0), ["sm_90a", "compute_90a"]) != ""


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_the_cuda_part_where_there_is_no_gpu():
    """It loads, says what it holds, and a launch raises in CUDA's words."""
    if native.cuda is None:
        pytest.skip("built without CUDA")
    assert native.cuda.targets[-1].startswith("compute_")
    assert native.cuda.runtime_version() >= 11_000
    assert native.cuda.driver_version() == 0
    with pytest.raises(RuntimeError, match=r"CUDA launch failed: .*(driver|device)"):
        native.cuda.randn(16, 0, 1, 1, 4, False, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: "), use_backend("cuda"):
        pass


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("ids", [None, [3]])
def test_a_cuda_device_that_is_not_there(ids):
    """Said before anything is put on it."""
    sampler = ddpm_fast.Sampler(lambda x, t: x, NoiseSchedule.linear(10), device="cuda")
    for call in (
        lambda: randn([1, 4], seed=0, sample_ids=ids, device="cuda"),
        lambda: sampler.sample([1, 4], sample_ids=ids),
    ):
        with pytest.raises(RuntimeError, match=r"there is no device cuda: torch .*CUDA"):
            call()
