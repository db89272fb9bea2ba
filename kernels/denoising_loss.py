"""denoising_loss: w mean((target - m)^2) of each sample, and its gradient 2 w / D (m - target), the
eps in the target redrawn (Ho et al. 2020, eq. 14). Moves 8 bytes an element in float32, 12 where
the target has x_0 in it: reads m (and x_0), writes the gradient."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from .algebra import residual, unit_from_pixel
from .launch import OPTIONS, SAMPLES_Y, cut
from .sums import BLOCK, SUM_OPTIONS, shares_in, store_share, sum_of_shares, vector_for_sums
from .tile import (
    draw,
    draw_of,
    field,
    holds,
    load,
    load_halves,
    of_sample,
    sample_of,
    store,
    store_halves,
    timestep_of,
)


@triton.jit(
    do_not_specialize=[
        "seed", "stream", "index", "num_steps", "t", "samples", "channels", "pixels", "lanes",
    ],
    do_not_specialize_on_alignment=[
        "shares_ptr", "seeds_ptr", "sample_ids_ptr", "indices_ptr", "forward_weights_ptr", "ts_ptr",
        "weights_ptr",
    ],
)  # fmt: skip
def denoising_loss_tile_kernel(
    model_output_ptr,  # [samples, channels, pixels], or with twice the channels where DOUBLED
    x0_ptr,  # [samples, channels, pixels], or None where the target is eps
    noise_ptr,  # the same, or None: drawn here
    gradient_ptr,  # like model_output, or None
    shares_ptr,  # float32 [samples, tiles]: of the sum of squared residuals
    seed: tl.int64,
    seeds_ptr,  # int64 [samples] or None
    sample_ids_ptr,  # int64 [samples] or None
    stream: tl.int64,
    index: tl.int64,
    indices_ptr,  # int64 [samples] or None
    forward_weights_ptr,  # float32 [num_steps, 2]: sqrt(abar), sqrt(1 - abar)
    num_steps: tl.int64,
    t: tl.int64,
    ts_ptr,  # int64 [samples] or None
    weights_ptr,  # float32 [samples] or None
    scale: tl.float32,  # of the gradient, but for the weight
    scale_rest: tl.float32,  # what float32 leaves out of it
    samples: tl.int64,
    channels: tl.int64,
    pixels: tl.int64,
    lanes: tl.int64,
    PREDICTION: tl.constexpr,
    DOUBLED: tl.constexpr,
    SAMPLES_Y: tl.constexpr,
    TILING: tl.constexpr,
):
    n, tile = sample_of(SAMPLES_Y), tl.program_id(0).to(tl.int64)
    if n >= samples:
        return
    VECTORS: tl.constexpr = field(TILING, "vectors")
    if DOUBLED:
        m, _ = load_halves(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
    else:
        m = load(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
    x0, z = m, m  # where the target has none
    if PREDICTION != "epsilon":
        x0 = load(x0_ptr, n, tile, channels, pixels, lanes, TILING)
    if PREDICTION != "sample":
        if noise_ptr is None:
            seed, sample_id = of_sample(seeds_ptr, n, seed), of_sample(sample_ids_ptr, n, n)
            index = draw_of(indices_ptr, n, index, stream)
            z = draw(tile, pixels, index, seed, sample_id, TILING)
        else:
            z = load(noise_ptr, n, tile, channels, pixels, lanes, TILING)
    forward_weights_ptr += 2 * timestep_of(ts_ptr, n, t, num_steps)
    signal, sigma = tl.load(forward_weights_ptr), tl.load(forward_weights_ptr + 1)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + n)
        scale = tl.fma(scale, weight, scale_rest * weight)

    held = holds(tile, channels, pixels, lanes, TILING)
    squares = tl.zeros_like(m[0])
    gradient, zeros = (), ()
    for j in tl.static_range(VECTORS):
        x0_j = x0[j]
        if PREDICTION != "epsilon" and x0_ptr.dtype.element_ty == tl.uint8:
            x0_j = unit_from_pixel(x0_j)
        r = residual(PREDICTION, signal, sigma, m[j], x0_j, z[j])
        gradient += (scale * r,)
        zeros += (tl.zeros_like(r),)
        r = tl.where(held, r, 0.0)
        squares = tl.fma(r, r, squares)
    if gradient_ptr is not None:
        if DOUBLED:
            store_halves(gradient_ptr, n, tile, channels, pixels, lanes, gradient, zeros, TILING)
        else:
            store(gradient_ptr, n, tile, channels, pixels, lanes, gradient, TILING)
    store_share(shares_ptr, n, 0, tl.sum(squares, 0), 1)


@triton.jit(
    do_not_specialize=["tiles", "elements"],
    do_not_specialize_on_alignment=["shares_ptr", "weights_ptr", "loss_ptr"],
)
def denoising_loss_sum_tile_kernel(
    shares_ptr,  # float32 [samples, tiles]
    weights_ptr,  # float32 [samples] or None
    loss_ptr,  # float32 [samples]
    tiles: tl.int64,
    elements: tl.int64,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    mean = sum_of_shares(shares_ptr, n, 0, tiles, 1, BLOCK) / elements.to(tl.float64)
    loss = mean.to(tl.float32)
    if weights_ptr is not None:
        loss = tl.load(weights_ptr + n) * loss
    tl.store(loss_ptr + n, loss)


def launch_denoising_loss(
    model_output: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    gradient: Tensor | None,
    loss: Tensor,
    scratch: Tensor | None,
    layout: tuple[int, int, int, bool],
    doubled: bool,
    address: tuple[int, Tensor | None, Tensor | None, int, int, Tensor | None],
    forward_weights: Tensor,
    t: int,
    ts: Tensor | None,
    prediction: str,
    weights: Tensor | None,
    gradient_scale: float,
) -> None:
    """Fills ``loss``, and ``gradient`` if given; layout: samples, channels, pixels, channels_last,
    of x0 and the noise, and of each half of the model's output. scratch: a float
    for every 128 elements of a sample or part of them; on the host it may be None."""
    samples, channels, pixels, channels_last = layout
    elements = channels * pixels
    if samples == 0:
        return
    vector = vector_for_sums(elements, [model_output, x0, noise])
    tiling, lanes, num_warps = how = cut(channels, pixels, channels_last, vector)
    grid = how.grid(samples)
    shares = shares_in(scratch, samples, grid[0], 1, loss)
    if elements > 0:
        scale = 2.0 / elements * gradient_scale
        rounded = float(np.float32(scale))
        denoising_loss_tile_kernel[grid](
            model_output,
            x0,
            noise,
            gradient,
            shares,
            *address,
            forward_weights,
            forward_weights.shape[0],
            t,
            ts,
            weights,
            rounded,
            scale - rounded,
            samples,
            channels,
            pixels,
            lanes,
            prediction,
            doubled,
            SAMPLES_Y,
            tiling,
            num_warps=num_warps,
            **OPTIONS,
        )
    denoising_loss_sum_tile_kernel[(samples, 1, 1)](
        shares, weights, loss, grid[0], elements, BLOCK, **SUM_OPTIONS
    )
