"""add_noise: the forward process x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z (Ho et al. 2020,
eq. 4). Reads x_0, writes x_t: 8 bytes an element in float32, 5 from uint8 pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .algebra import q_sample, unit_from_pixel
from .launch import OPTIONS, SAMPLES_Y, cut, vector_of
from .tile import draw, draw_of, field, load, of_sample, sample_of, store, timestep_of


@triton.jit(
    do_not_specialize=[
        "seed", "stream", "index", "num_steps", "t", "samples", "channels", "pixels", "lanes",
    ],
    do_not_specialize_on_alignment=[
        "seeds_ptr", "sample_ids_ptr", "indices_ptr", "weights_ptr", "ts_ptr",
    ],
)  # fmt: skip
def add_noise_tile_kernel(
    x0_ptr,  # [samples, channels, pixels]
    noise_ptr,  # the same, or None: drawn here
    out_ptr,  # the same
    seed: tl.int64,
    seeds_ptr,  # int64 [samples] or None
    sample_ids_ptr,  # int64 [samples] or None
    stream: tl.int64,
    index: tl.int64,
    indices_ptr,  # int64 [samples] or None
    weights_ptr,  # float32 [num_steps, 2]: sqrt(abar), sqrt(1 - abar)
    num_steps: tl.int64,
    t: tl.int64,
    ts_ptr,  # int64 [samples] or None
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
    x0 = load(x0_ptr, n, tile, channels, pixels, lanes, TILING)
    weights_ptr += 2 * timestep_of(ts_ptr, n, t, num_steps)
    signal, sigma = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    if noise_ptr is None:
        seed, sample_id = of_sample(seeds_ptr, n, seed), of_sample(sample_ids_ptr, n, n)
        index = draw_of(indices_ptr, n, index, stream)
        z = draw(tile, pixels, index, seed, sample_id, TILING)
    else:
        z = load(noise_ptr, n, tile, channels, pixels, lanes, TILING)
    x_t = ()
    for j in tl.static_range(field(TILING, "vectors")):
        if x0_ptr.dtype.element_ty == tl.uint8:
            x_t += (q_sample(signal, sigma, unit_from_pixel(x0[j]), z[j]),)
        else:
            x_t += (q_sample(signal, sigma, x0[j], z[j]),)
    store(out_ptr, n, tile, channels, pixels, lanes, x_t, TILING)


def launch_add_noise(
    x0: Tensor,
    noise: Tensor | None,
    out: Tensor,
    layout: tuple[int, int, int, bool],
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    weights: Tensor,
    t: int,
    ts: Tensor | None,
) -> None:
    """Fills ``out``; layout: samples, channels, pixels, channels_last, of all three."""
    samples, channels, pixels, channels_last = layout
    if samples * channels * pixels == 0:
        return
    vector = vector_of([x0, noise, out])
    tiling, lanes, num_warps = how = cut(channels, pixels, channels_last, vector)
    add_noise_tile_kernel[how.grid(samples)](
        x0,
        noise,
        out,
        seed,
        seeds,
        sample_ids,
        stream,
        index,
        indices,
        weights,
        weights.shape[0],
        t,
        ts,
        samples,
        channels,
        pixels,
        lanes,
        SAMPLES_Y,
        tiling,
        num_warps=num_warps,
        **OPTIONS,
    )
