"""vlb_terms and hybrid_loss: a term of the variational bound for each sample (Ho et al. 2020,
eqs. 5 and 13) and its gradient, x_t and x0_hat made of x_0, m and an eps that is redrawn. Reads 8
bytes an element in float32 (12 with learned variances), and writes as many of gradient as it reads
of the model."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .algebra import clip, kl_term, log_ratio, predict_x0, q_sample, residual, unit_from_pixel
from .decoder import decoder_term
from .launch import OPTIONS, SAMPLES_Y, cut
from .sums import BLOCK, SUM_OPTIONS, shares_in, store_share, sum_of_shares, vector_for_sums
from .tile import (
    draw,
    draw_of,
    field,
    holds,
    in_blocks,
    load,
    load_halves,
    of_sample,
    sample_of,
    store,
    store_halves,
    timestep_of,
)

BITS_PER_NAT = 1.4426950408889634


@triton.jit
def row_of(rows_ptr, t):
    """A timestep's nine numbers, as ddpm_fast/vlb_table.py names them."""
    row = ()
    for i in tl.static_range(9):
        row += (tl.load(rows_ptr + 9 * t + i),)
    return row


@triton.jit
def tile_terms(
    model_output_ptr,
    x0_ptr,
    noise_ptr,
    gradient_ptr,
    n,
    tile,
    channels,
    pixels,
    lanes,
    address,  # seed, sample id, draw
    row,
    lo,
    hi,
    m_scale,  # x0_hat's derivative by m, times the gradient's scale
    v_scale,  # the ratio's by v, likewise
    simple_scale,  # the regression's
    FIRST: tl.constexpr,  # t = 0
    PREDICTION: tl.constexpr,
    VARIANCE: tl.constexpr,
    CDF: tl.constexpr,
    HYBRID: tl.constexpr,
    TILING: tl.constexpr,
):
    """Writes a tile's gradient. Returns what its lanes add up to: the regression, the nats (not of
    a KL with a fixed variance, which follows from the error) and (x_0 - x0_hat)^2."""
    LEARNED: tl.constexpr = VARIANCE != "fixed"
    signal, sigma, r, c_x, c_m, precision, ratio_min, ratio_max, log_variance = row
    if LEARNED:
        m, v = load_halves(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
    else:
        m = load(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
        v = m  # not looked at
    given = load(x0_ptr, n, tile, channels, pixels, lanes, TILING)
    if noise_ptr is None:
        seed, sample_id, index = address
        z = draw(tile, pixels, index, seed, sample_id, TILING)
    else:
        z = load(noise_ptr, n, tile, channels, pixels, lanes, TILING)
    if not (FIRST or LEARNED):
        _, by_error, _ = kl_term(precision, ratio_min, 1.0)
        error_scale = by_error * m_scale

    held = holds(tile, channels, pixels, lanes, TILING)
    simple, vlb, squared_error = tl.zeros_like(m[0]), tl.zeros_like(m[0]), tl.zeros_like(m[0])
    by_m, by_v = (), ()
    for j in tl.static_range(field(TILING, "vectors")):
        x0 = given[j]
        if x0_ptr.dtype.element_ty == tl.uint8:
            x0 = unit_from_pixel(x0)
        unclipped = predict_x0(r, c_x, c_m, q_sample(signal, sigma, x0, z[j]), m[j])
        x0_hat = clip(unclipped, lo, hi)
        error = x0 - x0_hat
        if FIRST or LEARNED:
            ratio = log_ratio(VARIANCE, v[j], ratio_min, ratio_max, log_variance)
            if FIRST:
                log_std = 0.5 * (log_variance - ratio)
                nats, by_x0_hat, by_log_std = decoder_term(x0, x0_hat, log_std, CDF)
                by_ratio = -0.5 * by_log_std
            else:
                nats, by_x0_hat, by_ratio = kl_term(precision, ratio, error)
            vlb += tl.where(held, nats, 0.0)
            of_m = by_x0_hat * m_scale
            by_v += (by_ratio * v_scale,)
        else:
            of_m = error_scale * error
        if HYBRID:
            difference = residual(PREDICTION, signal, sigma, m[j], x0, z[j])
            by_m += (simple_scale * difference,)
            difference = tl.where(held, difference, 0.0)
            simple = tl.fma(difference, difference, simple)
        else:  # where the clip holds x0_hat fast m does not move it; a NaN is not held
            by_m += (tl.where((unclipped < lo) | (unclipped > hi), 0.0, of_m),)
        error = tl.where(held, error, 0.0)
        squared_error = tl.fma(error, error, squared_error)
    if gradient_ptr is not None:
        if LEARNED:
            store_halves(gradient_ptr, n, tile, channels, pixels, lanes, by_m, by_v, TILING)
        else:
            store(gradient_ptr, n, tile, channels, pixels, lanes, by_m, TILING)
    return simple, vlb, squared_error


@triton.jit
def shares_of(simple, vlb, squared_error, HYBRID: tl.constexpr, SUMMED: tl.constexpr):
    """Sums over lanes, but for what is 0 throughout."""
    of_simple, of_vlb = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if HYBRID:
        of_simple = tl.sum(simple, 0)
    if SUMMED:
        of_vlb = tl.sum(vlb, 0)
    return of_simple, of_vlb, tl.sum(squared_error, 0)


@triton.jit(
    do_not_specialize=[
        "seed", "stream", "index", "num_steps", "t", "samples", "channels", "pixels", "lanes",
    ],
    do_not_specialize_on_alignment=[
        "shares_ptr", "seeds_ptr", "sample_ids_ptr", "indices_ptr", "rows_ptr", "ts_ptr",
        "simple_weights_ptr", "vlb_weights_ptr",
    ],
)  # fmt: skip
def vlb_terms_tile_kernel(
    model_output_ptr,  # [samples, channels, pixels], twice the channels where VARIANCE is learned
    x0_ptr,  # [samples, channels, pixels]
    noise_ptr,  # the same, or None: drawn here
    gradient_ptr,  # like model_output, or None
    shares_ptr,  # float32 [samples, 3, tiles]: the regression, nats, (x_0 - x0_hat)^2
    seed: tl.int64,
    seeds_ptr,  # int64 [samples] or None
    sample_ids_ptr,  # int64 [samples] or None
    stream: tl.int64,
    index: tl.int64,
    indices_ptr,  # int64 [samples] or None
    rows_ptr,  # float32 [num_steps, 9]
    num_steps: tl.int64,
    t: tl.int64,
    ts_ptr,  # int64 [samples] or None
    lo: tl.float32,
    hi: tl.float32,
    simple_scale: tl.float32,  # 2 / elements
    vlb_scale: tl.float32,  # bits of a nat / elements
    gradient_scale: tl.float32,
    simple_weights_ptr,  # float32 [samples] or None
    vlb_weights_ptr,  # float32 [samples] or None
    samples: tl.int64,
    channels: tl.int64,
    pixels: tl.int64,
    lanes: tl.int64,
    PREDICTION: tl.constexpr,  # of the regression
    VARIANCE: tl.constexpr,  # learned, learned_range or fixed
    CDF: tl.constexpr,
    HYBRID: tl.constexpr,
    SAMPLES_Y: tl.constexpr,
    THREADS: tl.constexpr,  # of a program
    TILING: tl.constexpr,
):
    n, tile = sample_of(SAMPLES_Y), tl.program_id(0).to(tl.int64)
    if n >= samples:
        return
    t = timestep_of(ts_ptr, n, t, num_steps)
    row = row_of(rows_ptr, t)
    _, _, r, _, c_m, _, ratio_min, ratio_max, _ = row
    address = (
        of_sample(seeds_ptr, n, seed),
        of_sample(sample_ids_ptr, n, n),
        draw_of(indices_ptr, n, index, stream),
    )
    per_nat = vlb_scale * of_sample(vlb_weights_ptr, n, 1.0) * gradient_scale
    m_scale = r * c_m * per_nat
    v_scale = -per_nat
    if VARIANCE == "learned_range":
        v_scale = 0.5 * (ratio_max - ratio_min) * per_nat
    simple_scale = simple_scale * of_sample(simple_weights_ptr, n, 1.0) * gradient_scale

    if t == 0:
        # Four elements a thread at a time: more would take registers that the others lack.
        PARTS: tl.constexpr = field(TILING, "tile") // (4 * THREADS)
        PART: tl.constexpr = in_blocks(TILING, THREADS)
        simples = tl.zeros([4 * THREADS], tl.float32)
        vlbs, errors = simples, simples
        for i in range(PARTS):
            part = tile_terms(
                model_output_ptr, x0_ptr, noise_ptr, gradient_ptr, n, tile * PARTS + i, channels,
                pixels, channels * pixels // 4, address, row, lo, hi, m_scale, v_scale,
                simple_scale, True, PREDICTION, VARIANCE, CDF, HYBRID, PART,
            )  # fmt: skip
            simples += part[0]
            vlbs += part[1]
            errors += part[2]
        simple, vlb, squared_error = shares_of(simples, vlbs, errors, HYBRID, True)
    else:
        of_lanes = tile_terms(
            model_output_ptr, x0_ptr, noise_ptr, gradient_ptr, n, tile, channels, pixels, lanes,
            address, row, lo, hi, m_scale, v_scale, simple_scale, False, PREDICTION, VARIANCE, CDF,
            HYBRID, TILING,
        )  # fmt: skip
        simple, vlb, squared_error = shares_of(
            of_lanes[0], of_lanes[1], of_lanes[2], HYBRID, VARIANCE != "fixed"
        )
    if HYBRID:
        store_share(shares_ptr, n, 0, simple, 3)
    store_share(shares_ptr, n, 1, vlb, 3)
    store_share(shares_ptr, n, 2, squared_error, 3)


@triton.jit(
    do_not_specialize=["num_steps", "t", "tiles", "elements", "samples"],
    do_not_specialize_on_alignment=[
        "shares_ptr", "rows_ptr", "ts_ptr", "simple_weights_ptr", "vlb_weights_ptr", "total_ptr",
        "parts_ptr",
    ],
)  # fmt: skip
def vlb_terms_sum_tile_kernel(
    shares_ptr,  # float32 [samples, 3, tiles]
    rows_ptr,  # float32 [num_steps, 9]
    num_steps: tl.int64,
    t: tl.int64,
    ts_ptr,  # int64 [samples] or None
    simple_weights_ptr,  # float32 [samples] or None
    vlb_weights_ptr,  # float32 [samples] or None
    total_ptr,  # float32 [samples]: the weighted sum
    parts_ptr,  # float32 [3, samples]: the regression (0 unless HYBRID), the term, the error
    samples: tl.int64,
    tiles: tl.int64,
    elements: tl.int64,
    LEARNED: tl.constexpr,
    HYBRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = elements.to(tl.float64)
    nats = sum_of_shares(shares_ptr, n, 1, tiles, 3, BLOCK) / count
    squared_error = sum_of_shares(shares_ptr, n, 2, tiles, 3, BLOCK) / count
    if not LEARNED:
        t = timestep_of(ts_ptr, n, t, num_steps)
        precision, ratio = tl.load(rows_ptr + 9 * t + 5), tl.load(rows_ptr + 9 * t + 6)
        without, _, _ = kl_term(precision, ratio, 0.0)
        _, by_error, _ = kl_term(precision, ratio, 1.0)
        kl = without.to(tl.float64) - 0.5 * by_error.to(tl.float64) * squared_error
        nats = tl.where(t == 0, nats, kl)
    vlb = (nats * 1.4426950408889634).to(tl.float32)
    total = of_sample(vlb_weights_ptr, n, 1.0) * vlb
    simple = tl.zeros([], tl.float32)
    if HYBRID:
        simple = (sum_of_shares(shares_ptr, n, 0, tiles, 3, BLOCK) / count).to(tl.float32)
        total += of_sample(simple_weights_ptr, n, 1.0) * simple
    tl.store(parts_ptr + n, simple)
    tl.store(parts_ptr + samples + n, vlb)
    tl.store(parts_ptr + 2 * samples + n, squared_error.to(tl.float32))
    tl.store(total_ptr + n, total)


def launch_vlb_terms(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    gradient: Tensor | None,
    total: Tensor,
    parts: Tensor,
    scratch: Tensor | None,
    layout: tuple[int, int, int, bool],
    address: tuple[int, Tensor | None, Tensor | None, int, int, Tensor | None],
    rows: Tensor,
    t: int,
    ts: Tensor | None,
    prediction: str,
    variance: str,
    bounds: tuple[float, float],
    cdf: str,
    hybrid: bool,
    simple_weights: Tensor | None,
    vlb_weights: Tensor | None,
    gradient_scale: float,
) -> None:
    """Fills ``total`` and ``parts``, and ``gradient`` if given; layout: samples, channels, pixels,
    channels_last, of x0 and the noise, and of each half of the model's output. scratch: three
    floats for every 128 elements of a sample or part of them; on the host it may be None."""
    samples, channels, pixels, channels_last = layout
    elements = channels * pixels
    if samples == 0:
        return
    learned = variance.startswith("learned")
    vector = vector_for_sums(elements, [model_output, x0, noise])
    how = cut(channels, pixels, channels_last, vector)
    if learned:  # more elements a thread, and single ones at that, would take too many registers
        each = 8 if how.tiling.channels else 4
        how = cut(channels, pixels, channels_last, vector, elements_of_thread=each)
    tiling, lanes, num_warps = how
    grid = how.grid(samples)
    shares = shares_in(scratch, samples, grid[0], 3, total)
    if elements > 0:
        count = np.float32(elements)
        vlb_terms_tile_kernel[grid](
            model_output,
            x0,
            noise,
            gradient,
            shares,
            *address,
            rows,
            rows.shape[0],
            t,
            ts,
            *bounds,
            float(np.float32(2) / count),
            float(np.float32(BITS_PER_NAT) / count),
            gradient_scale,
            simple_weights,
            vlb_weights,
            samples,
            channels,
            pixels,
            lanes,
            prediction if hybrid else "",
            variance if learned else "fixed",
            cdf,
            hybrid,
            SAMPLES_Y,
            num_warps * launch.warp_size(),
            tiling,
            num_warps=num_warps,
            **OPTIONS,
        )
    vlb_terms_sum_tile_kernel[(samples, 1, 1)](
        shares,
        rows,
        rows.shape[0],
        t,
        ts,
        simple_weights,
        vlb_weights,
        total,
        parts,
        samples,
        grid[0],
        elements,
        learned,
        hybrid,
        BLOCK,
        **SUM_OPTIONS,
    )
