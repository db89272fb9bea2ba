"""Building: without a compiler, without the compiled part, and from scratch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def copy_of_sources(tmp_path: Path) -> Path:
    """The tree as git would clone it, in another folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    target = tmp_path / "ddpm_fast"
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


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


def fresh_environment(tmp_path: Path) -> Path:
    """A virtual environment that sees this one's packages, so that torch is not installed again."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(here) + "\n")
    return tmp_path / "env" / "bin" / "python"


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
