"""Building: without a compiler, without the compiled part, and from scratch."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packages import ROOT, build, copy_of_sources, empty_environment, fresh_environment
from packages import install as install_wheel


def test_no_compiler_says_what_to_install(tmp_path):
    pytest.importorskip("setuptools")
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp",
         str(tmp_path)],
        cwd=copy_of_sources(tmp_path), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "needs a C++17 compiler" in run.stderr
    assert "apt-get install g++" in run.stderr
    assert "DDPM_FAST_NATIVE=0" in run.stderr
    assert "Traceback" not in run.stderr


def test_sources_know_no_torch():
    """The native core takes integers, and any build of torch can use it."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            includes = [line for line in path.read_text().splitlines() if "#include" in line]
            assert not any("torch" in line or "ATen" in line for line in includes), path
            if path.parent.name == "core":
                assert not any(word in line for line in includes for word in ("cuda", "pybind"))


def test_native_module_links_no_torch():
    from ddpm_fast.backends import native

    if native is None or not shutil.which("ldd"):
        pytest.skip("needs the compiled module and ldd")
    linked = subprocess.run(["ldd", native.__file__], capture_output=True, text=True).stdout
    assert "libtorch" not in linked
    assert "libc10" not in linked


def test_native_module_asks_no_runtime_for_openmp():
    """A construct whose entry point csrc/cpu/threads.cpp does not hand on would take that of
    whichever runtime is loaded, or keep the module from being loaded."""
    from ddpm_fast.backends import native

    if native is None or sys.platform != "linux" or not shutil.which("nm"):
        pytest.skip("needs the compiled module, GNU/Linux and nm")
    command = ["nm", "-D", "--undefined-only", native.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "memcpy" in {symbol.partition("@")[0] for symbol in symbols}
    assert [symbol for symbol in symbols if symbol.startswith(("GOMP_", "omp_"))] == []


# The module by itself, at its path; noise of two samples, by four threads.
_ALONE = """
import array, hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
out = array.array("f", bytes(4 * 200_000))
native.randn(out.buffer_info()[0], 0, 2, 1, 100_000, False, 5, 0, 0, 0, 0, 0, 4)
print(native.openmp, hashlib.sha256(out.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("there_is_one", [True, False])
def test_module_runs_without_an_openmp_runtime(there_is_one, tmp_path):
    """On one thread, to the same bits."""
    from ddpm_fast import randn
    from ddpm_fast.backends import native

    if native is None or not native.openmp or sys.platform != "linux":
        pytest.skip("needs Linux and a module that was compiled with OpenMP")
    (tmp_path / "libgomp.so.1").write_text("not a library")
    run = subprocess.run(
        [sys.executable, "-c", _ALONE, native.__file__],
        env={} if there_is_one else {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    if there_is_one and run.stdout.startswith("False"):
        pytest.skip("this system has no OpenMP runtime but torch's")
    expected = hashlib.sha256(randn([2, 1, 100_000], seed=5).numpy().tobytes()).hexdigest()
    assert run.stdout.split() == [str(there_is_one), expected], run.stderr


# AVX and what came after it: registers wider than SSE's, and instructions with three operands.
_AVX = re.compile(r"%[yz]mm|%k[0-7]|\tv[a-z0-9]+ +[^#]*%xmm|\tv(zeroupper|ldmxcsr|stmxcsr)")


def functions_with_avx(objects: list[Path]) -> set[str]:
    """Demangled names of the functions in which a disassembler finds AVX instructions."""
    run = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", *map(str, objects)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, function = set(), ""
    for line in run.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif _AVX.search(line):
            found.add(function)
    return found


def objects_of(isa: str) -> list[Path]:
    """Those of the last build in this tree."""
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
    found = sorted((folder / f"cpu_{isa}.dir").rglob("*.o"))
    if not found or shutil.which("objdump") is None or platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 build in this tree and objdump")
    return found


def test_portable_kernels_are_for_any_processor():
    assert functions_with_avx(objects_of("portable")) == set()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_wide_instructions_stand_where_they_are_chosen(isa):
    """A function of another namespace could be merged with the same one of the portable kernels,
    which then would not run on a processor without AVX."""
    found = functions_with_avx(objects_of(isa))
    assert len(found) > 20, "the disassembly is not read right"
    assert {name for name in found if f"{isa}::" not in name} == set()


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
def test_install_from_scratch(tmp_path, native):
    """pip install under build isolation; without the compiled part the reference runs."""
    python = fresh_environment(tmp_path)
    source = copy_of_sources(tmp_path)
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--force-reinstall", "-q", str(source)],
        env={**os.environ, "DDPM_FAST_NATIVE": native}, check=True,
    )  # fmt: skip
    code = "import ddpm_fast; print(ddpm_fast.__file__); print(ddpm_fast.backends()['cpu'])"
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert str(tmp_path / "env") in run.stdout, run.stderr
    assert run.stdout.splitlines()[1].split()[1] == ("yes" if native == "1" else "no")


@pytest.mark.slow
def test_source_distribution_builds_and_runs(tmp_path):
    """From the tree to a wheel by way of the source distribution, compiled, in an empty
    environment."""
    built = build(copy_of_sources(tmp_path), tmp_path / "dist", DDPM_FAST_CUDA="OFF")
    (wheel,) = [path for path in built if path.suffix == ".whl"]
    python = empty_environment(tmp_path / "env")
    install_wheel(wheel, python)
    run = subprocess.run(
        [python, ROOT / "tests" / "smoke_wheel.py"],
        cwd=tmp_path, env={"PATH": str(python.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (module,) = (tmp_path / "env").glob("lib/python*/site-packages/ddpm_fast/_native*.so")
    linked = subprocess.run(["ldd", module], capture_output=True, text=True).stdout
    assert "omp" not in linked, linked


@pytest.mark.slow
def test_cuda_asked_for_and_not_to_be_had(tmp_path):
    """DDPM_FAST_CUDA=ON is an error where the part cannot be built, not a silent CPU build."""
    run = install(tmp_path, DDPM_FAST_CUDA="ON", CUDACXX="/nonexistent/nvcc")
    assert run.returncode != 0
    assert "DDPM_FAST_CUDA=ON, but" in run.stdout + run.stderr


def install(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Installs a copy of the sources into a fresh environment."""
    python = fresh_environment(tmp_path)
    return subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", str(copy_of_sources(tmp_path))],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def needs_nvcc() -> None:
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        pytest.skip("needs nvcc")


@pytest.mark.slow
def test_cuda_architectures_of_ones_choice(tmp_path):
    needs_nvcc()
    run = install(tmp_path, DDPM_FAST_CUDA="ON", DDPM_FAST_CUDA_ARCHS="120;86;100")
    assert run.returncode == 0, run.stderr
    code = "from ddpm_fast import _native; print(*_native.cuda.targets)"
    python = tmp_path / "env" / "bin" / "python"
    run = subprocess.run([python, "-c", f"import torch; {code}"], cwd=tmp_path,
                         capture_output=True, text=True)  # fmt: skip
    assert run.stdout.split() == ["sm_86", "sm_100", "sm_120", "compute_120"], run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "built"),
    [
        ("7.5", ["sm_80", "sm_90", "compute_90"]),
        ("9.0\n8.6\n9.0", ["sm_86", "sm_90", "compute_90"]),
    ],
)
def test_cuda_architectures_of_the_gpus_that_are_there(found, built, tmp_path):
    """A GPU that the kernels cannot be built for breaks no installation."""
    needs_nvcc()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{found}\\n'\n")
    (tools / "nvidia-smi").chmod(0o755)
    run = install(tmp_path, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert run.returncode == 0, run.stderr
    code = "import torch; from ddpm_fast import _native; print(*_native.cuda.targets)"
    python = tmp_path / "env" / "bin" / "python"
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == built, run.stderr


@pytest.mark.slow
def test_cuda_architectures_that_make_no_sense(tmp_path):
    needs_nvcc()
    run = install(tmp_path, DDPM_FAST_CUDA_ARCHS="70;90")
    assert run.returncode != 0
    assert "DDPM_FAST_CUDA_ARCHS: numbers from 80 on" in run.stdout + run.stderr


@pytest.mark.slow
def test_without_the_cuda_part(tmp_path):
    run = install(tmp_path, DDPM_FAST_CUDA="OFF")
    assert run.returncode == 0, run.stderr
    code = "import ddpm_fast; print(ddpm_fast.backends()['cuda'])"
    python = tmp_path / "env" / "bin" / "python"
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "installed without the CUDA kernels" in run.stdout, run.stderr


@pytest.mark.slow
def test_whole_demo(tmp_path):
    """The demo at its full length, held to what it promises."""
    import json

    run = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.cli", "demo", "--quiet", "--out", str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy_on_generated"] >= 0.9
