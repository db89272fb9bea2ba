"""Checks an installed package, with nothing but torch and numpy beside it: python smoke_wheel.py.

A wheel is tried by it where it was built (pyproject.toml, [tool.cibuildwheel]) and in an empty
environment (test_packaging.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from helpers import FROZEN_HASH, frozen_block, sha256

import ddpm_fast
from ddpm_fast.backends import native


def check(fact: bool, what: str) -> None:
    if not fact:
        sys.exit(f"{what}\n{ddpm_fast.backends()}\n{ddpm_fast.__file__}")


def openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return {path for path in paths if re.search(r"lib(g|i)?omp[-.]?\w*\.so", path)}


def main() -> None:
    installed = Path(ddpm_fast.__file__).parent
    check("site-packages" in installed.parts, "the source tree was imported, not the wheel")
    check(metadata.version("ddpm_fast") == ddpm_fast.__version__, "versions differ")
    check(not (installed.parent / "ddpm_fast.libs").exists(), "the wheel bundles a library")
    check(native is not None and ddpm_fast.backends()["cpu"].available, "no compiled kernels")

    torch.set_num_threads(2)
    for isa in native.supported_isas():
        native.set_isa(isa)
        check(sha256(frozen_block()) == FROZEN_HASH, f"other bits of the noise on {isa}")
    if sys.platform == "linux":
        check(native.openmp, "no OpenMP runtime was found")
        check(len(openmp_runtimes()) == 1, f"OpenMP runtimes: {openmp_runtimes()}")

    unet = ddpm_fast.UNet(
        ddpm_fast.UNetConfig(image_size=8, channels=(32,), attention_resolutions=())
    ).eval()
    sampler = ddpm_fast.Sampler(
        unet, ddpm_fast.NoiseSchedule.cosine(100), method="ddim", num_steps=2
    )
    images = sampler.sample([2, 3, 8, 8], seed=1)
    check(bool(images.isfinite().all()), "samples that are not finite")

    command = Path(sys.executable).parent / "ddpm-fast"
    environment = {**os.environ, "PYTHONPATH": ""}
    shown = subprocess.run([command, "info"], capture_output=True, text=True, env=environment)
    check(f"ddpm_fast {ddpm_fast.__version__}" in shown.stdout, f"ddpm-fast info: {shown.stderr}")
    print(f"ok {ddpm_fast.__version__}, {', '.join(native.supported_isas())}, {installed}")


if __name__ == "__main__":
    main()
