"""What Triton makes of group_norm_silu for GPUs that are not here, and for which launches anew.

python tests/triton_group_norm_compiler.py [all]    prints a JSON: of one case for sm_90, or of all
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton_compiler import compiled, facts_of
from triton_launches import Launch, differentiation, empty, normalisation

from ddpm_fast.kernels import group_norm_silu, group_norm_silu_bwd, group_norm_silu_sums

BATCHES = [((4, 128, 4, 4), "channels_last"), ((4, 12, 3, 3), "channels_last"),
           ((4, 12, 2, 6), "contiguous"), ((4, 6, 5, 5), "contiguous")]  # fmt: skip
CASES = {
    "bfloat16, channels_last": ("channels_last", "bfloat16", (2, 128, 64, 64), ""),
    "float32, contiguous": ("contiguous", "float32", (2, 128, 64, 64), "emb"),
    "bfloat16, channels_last, groups of 12": (
        "channels_last", "bfloat16", (2, 384, 16, 16), "emb scale residual",
    ),
}  # fmt: skip


def launches(whole: bool) -> Iterator[tuple[str, str, Launch]]:
    """Names, architectures and launches, forwards and backwards."""
    for name in CASES if whole else [*CASES][:1]:
        for arch in ("90", "gfx942") if whole else ("90",):
            yield name, arch, normalisation(*CASES[name])
            yield name, arch, differentiation(*CASES[name])


def kernels(whole: bool) -> list[dict[str, Any]]:
    return [
        {"name": name, "arch": arch, "kernel": kernel.metadata.name}
        | facts_of(kernel, elements, arch)
        for name, arch, launch in launches(whole)
        for kernel, elements in compiled(launch, arch)
    ]


def counts() -> dict[str, Any]:
    """How often each kernel is compiled for launches that differ in what is no reason to, and the
    codes for parts of a batch."""
    functions = (
        group_norm_silu.group_norm_silu_moments_tile_kernel,
        group_norm_silu.group_norm_silu_tile_kernel,
        group_norm_silu_sums.group_norm_silu_sums_tile_kernel,
        group_norm_silu_bwd.group_norm_silu_bwd_tile_kernel,
    )

    def kept() -> list[int]:
        return [sum(len(cache[0]) for cache in f.device_caches.values()) for f in functions]

    found: dict[str, Any] = {}
    layout = ("channels_last", "bfloat16")
    several = {
        "batch sizes": [(*layout, (n, 128, 16, 16), "emb") for n in (1, 2, 16, 17)],
        "images": [(*layout, (2, 128, *sides), "emb") for sides in ((16, 16), (8, 32), (4, 64))],
        "rows of channels aside": [(*layout, (2, 128, 16, 16), "emb", i) for i in range(3)],
    }
    for name, arguments in several.items():
        before = kept()
        for argument in arguments:
            compiled(normalisation(*argument), "90")
            compiled(differentiation(*argument), "90")
        found[name] = [after - b for after, b in zip(kept(), before, strict=True)]
    codes = []
    for shape, memory in BATCHES:
        batch = empty(shape, memory, torch.bfloat16)
        parts = [compiled(normalisation(memory, x=batch[i:]), "90") for i in range(3)]
        codes.append(len({tuple(facts_of(*kernel, "90")["code"] for kernel in p) for p in parts}))
    found["codes for parts of a batch"] = codes
    return found


if __name__ == "__main__":
    whole = "all" in sys.argv
    json.dump({"kernels": kernels(whole), "counts": counts() if whole else None}, sys.stdout)
