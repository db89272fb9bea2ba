"""The Triton reverse step cut otherwise than kernels/launch.py cuts it: threads of a program and
elements of a thread, at a size where the memory or the arithmetic decides. GPUs only."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from correctness import agree
from results import OURS

from ddpm_fast import NoiseSchedule, backends, randn, reverse_step, use_backend

TABLE = NoiseSchedule.linear().step_table(prediction="epsilon", variance="fixed_small")
THREADS, ELEMENTS = (32, 64, 128, 256), (8, 16, 32)


@contextlib.contextmanager
def cut_into(threads: int, elements: int) -> Iterator[None]:
    """Programs of that many threads, and elements a thread."""
    from ddpm_fast.kernels import launch, reverse_step

    def cut(channels: int, pixels: int, channels_last: bool, vector: int) -> launch.Cut:
        chosen = launch.cut(channels, pixels, channels_last, vector)
        lanes = threads * max(elements // (chosen.tiling.vectors * chosen.tiling.vector), 1)
        tiling = replace(chosen.tiling, lanes=lanes)
        return chosen._replace(tiling=tiling, num_warps=threads // launch.warp_size())

    reverse_step.cut = cut
    try:
        yield
    finally:
        reverse_step.cut = launch.cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_cuts(compare, large_size, dtype, gpu):
    if not backends()["triton"].available:
        pytest.skip("Triton is not installed")
    from ddpm_fast.kernels.launch import warp_size

    x, eps = (randn(large_size, seed=i, device=gpu, dtype=dtype) for i in (1, 2))
    table, out = TABLE.to(gpu), torch.empty_like(x)

    def step() -> torch.Tensor:
        with use_backend("triton"):
            return reverse_step(x, eps, table, 500, seed=1, out=out)

    def step_cut(threads: int, elements: int) -> torch.Tensor:
        with cut_into(threads, elements):
            return step()

    cuts = [cut for cut in itertools.product(THREADS, ELEMENTS) if cut[0] >= warp_size()]
    candidates = {OURS: step}
    for threads, elements in cuts:
        name = f"{threads} threads of {elements}"
        candidates[name] = lambda t=threads, e=elements: step_cut(t, e)

    def check() -> None:
        expected = step().clone()
        for threads, elements in cuts:
            agree(f"{threads} threads of {elements}", step_cut(threads, elements), expected)

    name = f"Triton reverse_step {str(dtype).removeprefix('torch.')}"
    compare(name, x, 3 * x.nbytes, candidates, check)
