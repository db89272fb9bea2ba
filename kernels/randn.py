"""randn: out[n, e] = z(seed, sample n, draw, e). Writes 4 bytes an element, 2 for 16-bit types."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, SAMPLES_Y, cut, vector_of
from .tile import draw, draw_of, of_sample, sample_of, store


@triton.jit(
    do_not_specialize=["seed", "stream", "index", "samples", "channels", "pixels", "lanes"],
    do_not_specialize_on_alignment=["seeds_ptr", "sample_ids_ptr", "indices_ptr"],
)
def randn_tile_kernel(
    out_ptr,  # [samples, channels, pixels]
    seed: tl.int64,
    seeds_ptr,  # int64 [samples] or None
    sample_ids_ptr,  # int64 [samples] or None
    stream: tl.int64,
    index: tl.int64,
    indices_ptr,  # int64 [samples] or None
    samples: tl.int64,
    channels: tl.int64,
    pixels: tl.int64,
    lanes: tl.int64,
    SAMPLES_Y: tl.constexpr,
    TILING: tl.constexpr,
):
    n, tile = sample_of(SAMPLES_Y), tl.program_id(0).to(tl.int64)
    if n >= samples:
        return
    index = draw_of(indices_ptr, n, index, stream)
    seed = of_sample(seeds_ptr, n, seed)
    sample_id = of_sample(sample_ids_ptr, n, n)
    z = draw(tile, pixels, index, seed, sample_id, TILING)
    store(out_ptr, n, tile, channels, pixels, lanes, z, TILING)


def launch_randn(
    out: Tensor,
    layout: tuple[int, int, int, bool],
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
) -> None:
    """Fills ``out``; layout: samples, channels, pixels, channels_last."""
    samples, channels, pixels, channels_last = layout
    if samples * channels * pixels == 0:
        return
    tiling, lanes, num_warps = how = cut(channels, pixels, channels_last, vector_of([out]))
    randn_tile_kernel[how.grid(samples)](
        out,
        seed,
        seeds,
        sample_ids,
        stream,
        index,
        indices,
        samples,
        channels,
        pixels,
        lanes,
        SAMPLES_Y,
        tiling,
        num_warps=num_warps,
        **OPTIONS,
    )
