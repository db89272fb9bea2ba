"""The CUDA kernels' bodies on the host: native/cuda_on_host.cpp, compiled once for its sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from ddpm_fast.backends import native
from ddpm_fast.ops.group_norm_silu_run import cuda_chunks

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "native" / "cuda_on_host.cpp"
OPS = ["randn", "add_noise", "reverse_step", "denoising_loss", "vlb_terms"]
# With where the fields of GroupNormShape are among their arguments.
GROUP_NORM_OPS = {"group_norm_silu": 17, "group_norm_silu_sums": 8, "group_norm_silu_bwd": 8}


@functools.cache
def load() -> ModuleType:
    """The module; its ops take csrc/arguments.h's arguments and nothing more."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    flags = shlex.split("-std=c++17 -O1 -ffp-contract=off -Wall -Wextra -Werror -shared -fPIC")
    flags += ["-fvisibility=hidden", *shlex.split(os.environ.get("TEST_CXXFLAGS", ""))]
    if native is not None and "avx2" in native.supported_isas():
        flags.append("-mfma")  # std::fma in one instruction; the bits are the same
    sources = [
        SOURCE,
        *sorted((ROOT / "csrc").rglob("*.h")),
        *sorted((ROOT / "csrc").rglob("*.cuh")),
    ]
    digest = hashlib.sha256(" ".join([compiler, *flags, sys.version]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = ROOT / "build" / "tests" / f"cuda_on_host-{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):  # processes share the work, and want one each
        if not library.exists():
            include = [sysconfig.get_path("include"), pybind11.get_include()]
            partial = library.with_suffix(".partial")
            command = [*shlex.split(compiler), *flags, *(f"-I{path}" for path in include)]
            subprocess.run([*command, str(SOURCE), "-o", str(partial)], check=True)
            partial.rename(library)
    spec = importlib.util.spec_from_file_location("cuda_on_host._native", library)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class AsNative:
    """Stands in for the native module where the ops look for the CPU's kernels."""

    def __init__(self) -> None:
        self.module = load()

    def __getattr__(self, name: str):
        if name in OPS:
            kernel = getattr(self.module, name)
            return lambda *arguments: kernel(*arguments[:-1])  # without the number of threads
        if name in GROUP_NORM_OPS:
            return functools.partial(self.in_chunks, getattr(self.module, name), name)
        return getattr(native, name)

    @staticmethod
    def in_chunks(kernel, name: str, *arguments) -> None:
        """With the CUDA backend's chunks and scratch memory, NaN, in the place of the CPU's."""
        begin = GROUP_NORM_OPS[name]
        shape = arguments[begin : begin + 6]
        chunk, chunks = cuda_chunks(shape)
        each = 2 * chunks + 3 if name == "group_norm_silu" else 3 * chunks
        scratch = torch.full((shape[0] * shape[1] * each,), torch.nan)
        kernel(*arguments[:-4], scratch.data_ptr(), chunk, chunks)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module; on_host.run(f) calls f with its kernels in the place of the CPU's."""
    module = load()
    backends, stand_in = import_module("ddpm_fast.backends"), AsNative()

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "native", stand_in)
            return call()

    module.run = run
    yield module
    module.set_blocks_only(False)
    module.set_chunks_only(False)
    module.set_most_tiles(2**64 - 1)
