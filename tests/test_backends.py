"""Which backend runs, and what is said when one cannot; threads and the OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import ddpm_fast
from ddpm_fast import NoiseSchedule, add_noise, backends, randn, use_backend
from ddpm_fast.backends import native, select


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
