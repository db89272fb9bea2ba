"""Builds ddpm_fast/_native*.so with CMake; everything else about the package is in pyproject.toml.

Environment variables:
    DDPM_FAST_NATIVE=0          no compiled part: the pure PyTorch reference package
    DDPM_FAST_CUDA=ON|OFF|AUTO  the CUDA kernels (AUTO: where nvcc is found)
    DDPM_FAST_CUDA_ARCHS=80;90  their architectures
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

NO_COMPILER = """
ddpm_fast needs a C++17 compiler to build its CPU kernels, and found none (looked for {looked}).
  Debian, Ubuntu:   apt-get install g++
  Fedora, RHEL:     dnf install gcc-c++
  macOS:            xcode-select --install
Another compiler is named by the environment variable CXX.
To install without compiled kernels (pure PyTorch, much slower), set DDPM_FAST_NATIVE=0.
"""


class CleanBuild(build_py):
    """Without the files of an earlier build, which setuptools would pack even if they are gone."""

    def run(self) -> None:
        target = Path(self.build_lib).resolve()
        if not self.editable_mode and ROOT / "build" in target.parents:
            shutil.rmtree(target, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(name.split()[0]) for name in candidates):
            sys.exit(NO_COMPILER.format(looked=", ".join(candidates)))
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "--fresh",  # the build's own Python and CMake lie in another folder each time
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        for switch in ("DDPM_FAST_CUDA", "DDPM_FAST_CUDA_ARCHS"):
            if os.environ.get(switch):
                configure.append(f"-D{switch}={os.environ[switch]}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


native = os.environ.get("DDPM_FAST_NATIVE", "1") != "0"
if not native:
    for module in (ROOT / "ddpm_fast").glob("_native*.so"):
        module.unlink()  # of an earlier build in this tree: it would be loaded
setup(
    ext_modules=[Extension("ddpm_fast._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild},
)
