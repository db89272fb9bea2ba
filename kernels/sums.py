"""Sums over samples in an order of additions that the batch has no say in, without atomics: each
program leaves its tile's share in memory, and a second kernel, one program a sample, adds those up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import vector_of

# Of the second kernel: a warp, which takes 128 shares at a time.
SUM_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
BLOCK = 128


@triton.jit
def store_share(shares_ptr, n, which, share, SUMS: tl.constexpr):
    """This program's share of one of a sample's sums; shares: [samples, SUMS, tiles]."""
    tiles = tl.num_programs(0).to(tl.int64)
    tl.store(shares_ptr + ((n * SUMS + which) * tiles + tl.program_id(0)), share)


@triton.jit
def sum_of_shares(shares_ptr, n, which, tiles, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """One of a sample's sums, in float64."""
    shares_ptr += (n * SUMS + which) * tiles
    sums = tl.zeros([BLOCK], tl.float64)
    i = tl.arange(0, BLOCK).to(tl.int64)
    left = tiles
    while left > 0:  # the interpreter has no range() of what a launch is told
        sums += tl.load(shares_ptr + i, mask=i < tiles, other=0.0).to(tl.float64)
        i += BLOCK
        left -= BLOCK
    return tl.sum(sums, 0)


def vector_for_sums(elements: int, tensors: Sequence[Tensor | None]) -> int:
    """Elements of a vector, as launch.cut() takes them: 1 where samples follow each other at
    addresses that are not all aligned to 16 bytes.

    There, a part of a batch would take another kernel than all of it, whose threads hold other
    elements, and add them up in another order.
    """
    narrowest = min(t.dtype.itemsize for t in tensors if t is not None)
    return 1 if elements * narrowest % 16 else vector_of(tensors)


def shares_in(scratch: Tensor | None, samples: int, tiles: int, sums: int, like: Tensor) -> Tensor:
    """Where the shares lie. Of scratch there is none on the host, where the interpreter runs."""
    if scratch is None:
        return torch.empty(samples * tiles * sums, dtype=torch.float32, device=like.device)
    assert scratch.numel() >= samples * tiles * sums
    return scratch
