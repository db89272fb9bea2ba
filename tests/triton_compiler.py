"""What Triton makes of the kernels for GPUs that are not here: compiled, not run.

python tests/triton_compiler.py ARCH      prints a JSON of every kernel for one of ARCHS
python tests/triton_compiler.py launches  prints how many kernels launches that differ take

A process of its own, because Triton either compiles or interprets.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from machine_code import find_tool, functions_of  # noqa: E402
from triton_launches import (  # noqa: E402
    SHAPES,
    Launch,
    bound,
    drawing,
    empty,
    noising,
    regression,
    step,
)

from ddpm_fast.kernels import (  # noqa: E402
    add_noise,
    denoising_loss,
    randn,
    reverse_step,
    vlb_terms,
)
from ddpm_fast.kernels import launch as launching  # noqa: E402
from ddpm_fast.kernels.group_norm_silu_cut import Blocks  # noqa: E402
from ddpm_fast.kernels.tile import Tiling  # noqa: E402

ARCHS = ["80", "90", "gfx942"]


class Driver:
    """Says that there is a GPU: the kernels are compiled for it."""

    def __init__(self, arch: str) -> None:
        self.device = ARCHS.index(arch)  # kernels are kept by device
        is_amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch), 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(launch: Launch, arch: str) -> list[tuple[Any, int]]:
    """The kernels that a launch takes there, and the elements of their tiles; 0 where a kernel adds
    up what tiles left."""
    found = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        elements = sum(arg.tile for arg in args if isinstance(arg, Tiling | Blocks))
        found.append((run(self, *args, grid=grid, warmup=True, **kwargs), elements))

    run, JITFunction.run = JITFunction.run, compile_only
    gpu = Driver(arch)
    driver.set_active(gpu)
    launching.warp_size = lambda: gpu.target.warp_size
    launching.cut.cache_clear()
    try:
        launch()
    finally:
        JITFunction.run = run
    return found


def cases() -> Iterator[tuple[str, str, Launch]]:
    """Names, layouts and launches."""
    for layout in SHAPES:
        yield "randn float32", layout, drawing(layout, "float32")
        yield "add_noise float32", layout, noising(layout, torch.float32, "float32")
        yield "reverse_step float32", layout, step(layout)
        yield (
            "reverse_step float32 with learned variance",
            layout,
            step(layout, variance="learned_range"),
        )
    for layout in ("contiguous", "channels_last 3", "channels_last 4"):
        yield "randn bfloat16", layout, drawing(layout, "bfloat16")
        yield "reverse_step bfloat16", layout, step(layout, "bfloat16", "bfloat16")
    layout = "contiguous"
    yield "add_noise uint8 → float32", layout, noising(layout, torch.uint8, "float32")
    yield "reverse_step float16", layout, step(layout, "float16", "float16")
    for layout in ("contiguous", "channels_last 4"):
        yield (
            "reverse_step bfloat16 with learned variance",
            layout,
            step(layout, "bfloat16", "bfloat16", "learned"),
        )
    layout = "contiguous"
    yield "reverse_step float32, noise given", layout, step(layout, noise="float32")
    yield (
        "reverse_step float32, model bfloat16, with bfloat16 output",
        layout,
        step(layout, m="bfloat16", out_lowp="bfloat16"),
    )
    yield "reverse_step float32 with guidance", layout, step(layout, guidance=True)
    yield "reverse_step float32, looking for NaN", layout, step(layout, nan_step=True)
    yield (
        "reverse_step float32 with everything",
        layout,
        step(
            layout, variance="learned", row=torch.tensor(3), guidance=True, nan_step=True,
            x0="float32", out_x0="float32", out_lowp="bfloat16",
        ),
    )  # fmt: skip
    for layout in ("contiguous", "channels_last 4"):
        yield "denoising_loss float32", layout, regression(layout)
    for layout in ("contiguous", "channels_last 3"):
        yield (
            "denoising_loss float32 of v, with a second half",
            layout,
            regression(layout, prediction="v_prediction", doubled=True),
        )
    yield "denoising_loss bfloat16", "contiguous", regression(m="bfloat16")
    yield "denoising_loss, adding up", "sums", regression()
    yield "vlb_terms float32", "contiguous", bound()
    for layout in ("contiguous", "channels_last odd"):
        yield (
            "hybrid_loss float32",
            layout,
            bound(layout, variance="learned_range", hybrid=True),
        )
    yield (
        "vlb_terms bfloat16 of uint8, learned variance, tanh",
        "contiguous",
        bound("contiguous", "bfloat16", "learned", "tanh", x0=torch.uint8),
    )
    yield "hybrid_loss, adding up", "sums", bound(variance="learned_range", hybrid=True)


def facts(name: str, layout: str, arch: str, launch: Launch) -> dict[str, Any]:
    """What the assembly has of each instruction; on NVIDIA's GPUs the machine code, too."""
    found = {"name": name, "layout": layout, "arch": arch}
    return found | facts_of(*compiled(launch, arch)[-1 if layout == "sums" else 0], arch)


def facts_of(kernel: Any, elements: int, arch: str) -> dict[str, Any]:
    is_amd = arch.startswith("gfx")
    assembly = kernel.asm["amdgcn" if is_amd else "ptx"]
    found = {
        "shared": kernel.metadata.shared,
        "assembly": Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.]+)", assembly, re.M)),
    }
    threads = kernel.metadata.num_warps * (64 if is_amd else 32)
    found["of a thread"] = elements // threads
    if is_amd:
        found["scratch"] = int(re.search(r"private_segment_fixed_size:?\s+(\d+)", assembly)[1])
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        ((instructions),) = functions_of(Path(cubin.name)).values()
        used = subprocess.run(
            [find_tool("cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True
        ).stdout
    found["machine"] = Counter(line.split()[line.startswith("@")] for line in instructions)
    found["per element"] = len(instructions) * threads / (elements or threads)
    found["code"] = hashlib.sha256("\n".join(instructions).encode()).hexdigest()
    for key in ("REG", "STACK", "LOCAL"):
        found[key] = int(re.search(rf"\b{key}:(\d+)", used)[1])
    return found


def kernels_of(function: JITFunction, launches: list[Launch]) -> int:
    """How many kernels of a function are compiled for some launches, one after the other."""
    before = sum(len(cache[0]) for cache in function.device_caches.values())
    for launch in launches:
        compiled(launch, "90")
    return sum(len(cache[0]) for cache in function.device_caches.values()) - before


def counts() -> dict[str, int]:
    """Of launches that differ in what is no reason to compile, and in what is one."""
    stepping, drawing_, noising_ = (
        reverse_step.reverse_step_tile_kernel,
        randn.randn_tile_kernel,
        add_noise.add_noise_tile_kernel,
    )
    images = [(2, 3, 64, 64), (2, 4, 64, 64), (2, 3, 128, 128), (2, 1, 256, 256), (1, 16, 64, 64)]
    odd = [(n, c, 7, 7) for n in (1, 16) for c in (5, 16, 31)]
    numbers = torch.arange(16)  # of which every other is aligned to 16 bytes
    several = {
        "batch sizes": [step(shape=(n, 3, 64, 64)) for n in (1, 2, 3, 16, 17, 256, 1000)],
        "images": [step(shape=shape) for shape in images],
        "seeds": [step(seed=seed) for seed in (0, 1, 16, 2**31, 2**40 + 1, -1, -(2**63))],
        "rows": [step(row=row) for row in (0, 1, 2, 16, 17, 999)],
        "rows on the device": [step(row=numbers[i]) for i in range(4)]
        + [step(row=numbers[i : i + 2]) for i in range(4)],
        "clips and scales": [
            step(guidance=True, clip=clip, scale=scale)
            for clip, scale in (((-1.0, 1.0), 0.0), ((0.0, 1.0), 1.0), ((-16.0, math.inf), 16.0))
        ],
        "scales on the device": [
            step(guidance=True, scales=numbers.float()[i : i + 2]) for i in range(4)
        ],
        "ids on the device": [step(ids=numbers[i : i + 2]) for i in range(4)],
        "odd images": [step("channels_last odd", shape=shape) for shape in odd],
        "another layout": [step("channels_last 3")],
        "another dtype": [step(x="bfloat16", m="bfloat16")],
    }
    found = {name: kernels_of(stepping, launches) for name, launches in several.items()}
    draws = [drawing("contiguous", "float32", seed, index) for seed in (1, -3) for index in (0, 9)]
    draws += [drawing("contiguous", "float32", shape=(n, c, 32, 32)) for n, c in ((1, 3), (16, 3))]
    found["draws"] = kernels_of(drawing_, draws)
    draws = [drawing("contiguous", "float32", shape=shape) for shape in images]
    found["draws of images"] = kernels_of(drawing_, draws)
    draws = [drawing("channels_last odd", "float32", shape=shape) for shape in odd]
    found["draws of odd images"] = kernels_of(drawing_, draws)
    plain = torch.float32
    added = [noising("contiguous", plain, "float32", t) for t in (0, 1, 16, 999)]
    found["timesteps"] = kernels_of(noising_, added)
    added = [noising("contiguous", plain, "float32", ts=numbers[i : i + 2]) for i in range(4)]
    found["timesteps on the device"] = kernels_of(noising_, added)
    return found | counts_of_the_objective(images, numbers)


def counts_of_the_objective(images, numbers) -> dict[str, int]:
    """And of parts of a batch: how many different codes its samples are added up by."""
    losses, sums = (
        denoising_loss.denoising_loss_tile_kernel,
        denoising_loss.denoising_loss_sum_tile_kernel,
    )
    terms, totals = vlb_terms.vlb_terms_tile_kernel, vlb_terms.vlb_terms_sum_tile_kernel
    alike = [regression(seed=seed, t=t, scale=2.0**t) for seed, t in ((1, 0), (-9, 16), (0, 1))]
    alike += [regression(shape=(n, 3, 32, 32)) for n in (1, 16, 17)]
    of_images = [regression(shape=shape) for shape in images]
    on_the_device = [regression(ts=numbers[i : i + 2]) for i in range(4)]
    found = {
        "losses": kernels_of(losses, alike),
        "losses of images": kernels_of(losses, of_images),
        "losses at timesteps on the device": kernels_of(losses, on_the_device),
        "their sums": kernels_of(sums, alike + of_images + on_the_device),
    }
    alike = [bound(seed=seed, t=t) for seed, t in ((1, 0), (-9, 16), (0, 1))]
    alike += [bound(shape=(n, 3, 32, 32)) for n in (1, 16, 17)]
    found["terms"] = kernels_of(terms, alike)
    found["terms of images"] = kernels_of(terms, [bound(shape=shape) for shape in images])
    found["their totals"] = kernels_of(totals, alike)
    batches = {
        "images": ((4, 3, 32, 32), ""),
        "12 elements": ((4, 1, 2, 6), ""),  # 24 bytes
        "63 elements": ((4, 7, 3, 3), ""),
        "63 elements in channels_last": ((4, 7, 3, 3), "channels_last"),
    }
    for name, (shape, layout) in batches.items():
        batch = empty(shape, layout, torch.bfloat16)
        parts = [regression(output=batch[i:], shape=batch[i:].shape) for i in range(3)]
        codes = {facts("", "", "90", part)["code"] for part in parts}
        found[f"codes for parts of a batch, {name}"] = len(codes)
    return found


if __name__ == "__main__":
    what = sys.argv[1]
    answer = counts() if what == "launches" else [facts(*c[:2], what, c[2]) for c in cases()]
    json.dump(answer, sys.stdout)
