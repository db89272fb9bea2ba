"""How a problem is cut into programs, and what every launch is told.

There is no autotuner. The cut depends on a sample's shape, its layout and its dtypes, so that
another batch size, seed or step compiles nothing; shapes that are cut alike share a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .tile import Tiling

# The kernels say where they mean a fused multiply-add; the compiler adds none.
OPTIONS = {"enable_fp_fusion": False}
SAMPLES_Y = 65_535  # the most that a grid's second dimension may have on NVIDIA's GPUs


class Cut(NamedTuple):
    """Of a sample, into programs."""

    tiling: Tiling
    lanes: int  # of the sample
    num_warps: int

    def grid(self, samples: int) -> tuple[int, int, int]:
        """Of programs: tiles, samples, and samples beyond SAMPLES_Y."""
        return (
            -(-self.lanes // self.tiling.lanes),
            min(samples, SAMPLES_Y),
            -(-samples // SAMPLES_Y),
        )


def vector_of(tensors: Iterable[Tensor | None]) -> int:
    """Elements of a vector: 16 bytes of the widest dtype among the tensors of a sample's size."""
    return 8 if all(t is None or t.dtype.itemsize <= 2 for t in tensors) else 4


@functools.cache
def warp_size() -> int:
    """Threads of a warp: 32, and 64 on some of AMD's GPUs."""
    if torch.version.hip is None:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


@functools.lru_cache(maxsize=1024)
def cut(
    channels: int,
    pixels: int,
    channels_last: bool,
    vector: int,
    warp: int = 0,
    elements_of_thread: int = 16,
) -> Cut:
    """The cut of samples [channels, pixels]; warp: threads of one, those of this machine's if 0.

    Whole vectors where the sample is contiguous, or channels_last with 2 to 4 channels, and comes
    out even; else, and where vector is 1, single elements. A program has about elements_of_thread
    elements a thread, and as many of 128, 64 or 32 threads as leave at most an eighth of the lanes
    without work in a sample's last tile, or else the fewest. Where a lane for each of the fewest
    threads is enough, it is that. 16 elements of a float32 tensor are four loads of 16 bytes, all
    in flight.
    """
    warp = warp or warp_size()
    elements = channels * pixels
    interleaved, count = (channels, pixels) if channels_last else (1, elements)
    if interleaved > 4 or count % 4 or vector == 1:
        interleaved, of_lane, vector = 0, 4, 4
    else:
        # 8 pixels of 3 channels would take 150 registers a thread and more.
        if interleaved == 3 or (interleaved == 1 and count % 8):
            vector = 4
        of_lane = 4 if interleaved > 1 else vector
    lane = of_lane * max(interleaved, 1)
    lanes = -(-elements // lane)
    threads, of_thread = warp, 1
    if lanes > warp:
        of_thread = max(elements_of_thread // lane, 1)
        idle = {n: -lanes % (n * of_thread) for n in (128, 64, 32) if n >= warp}
        threads = min(idle, key=lambda n: max(8 * idle[n], lanes))
    tiling = Tiling(interleaved, of_lane, vector, threads * of_thread, channels_last)
    return Cut(tiling, lanes, threads // warp)
