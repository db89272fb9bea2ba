"""reverse_step: one step of the reverse process, for every sampler that is affine in (x0_hat, x, m,
z) (Ho et al. 2020, eqs. 7, 11 and 15; Song et al. 2021, eq. 12):

    x0_hat = clip(r * fma(c_m, m, c_x * x), lo, hi)
    x'     = fma(b_0, x0_hat, fma(b_x, x, fma(b_m, m, sigma * z)))

Moves 12 bytes an element in float32: reads x and m, writes x'."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .algebra import clip, guided, log_var_between, predict_x0, sigma_of, step_to
from .launch import OPTIONS, SAMPLES_Y, cut, vector_of
from .tile import draw, field, holds, load, load_halves, of_sample, sample_of, store


@triton.jit(
    do_not_specialize=[
        "seed", "stream", "num_rows", "step", "steps_stride", "guidance_scales_stride", "samples",
        "channels", "pixels", "lanes",
    ],
    do_not_specialize_on_alignment=[
        "nan_step_ptr", "seeds_ptr", "sample_ids_ptr", "rows_ptr", "timesteps_ptr", "steps_ptr",
        "guidance_scales_ptr",
    ],
)  # fmt: skip
def reverse_step_tile_kernel(
    x_ptr,  # [samples, channels, pixels]
    model_output_ptr,  # the same, or with twice the channels where VARIANCE is not "none"
    model_output_uncond_ptr,  # like model_output, or None: no guidance
    x0_ptr,  # like x: takes the place of x0_hat before the clip; or None
    noise_ptr,  # like x, or None: drawn here
    out_ptr,  # like x; may be x
    out_x0_ptr,  # like x, or None
    out_lowp_ptr,  # like x, or None
    nan_step_ptr,  # int32 [1], lowered to the first row whose result holds a NaN; or None
    seed: tl.int64,
    seeds_ptr,  # int64 [samples] or None
    sample_ids_ptr,  # int64 [samples] or None
    stream: tl.int64,
    rows_ptr,  # float32 [num_rows, 9]
    timesteps_ptr,  # int64 [num_rows]: the index of each row's draw
    num_rows: tl.int64,
    step: tl.int64,
    steps_ptr,  # int64 [samples], [1] where the stride is 0, or None: one row for all
    steps_stride: tl.int64,
    lo: tl.float32,
    hi: tl.float32,
    guidance_scale: tl.float32,
    guidance_scales_ptr,  # float32 [samples], [1] where the stride is 0, or None
    guidance_scales_stride: tl.int64,
    samples: tl.int64,
    channels: tl.int64,
    pixels: tl.int64,
    lanes: tl.int64,
    VARIANCE: tl.constexpr,
    SAMPLES_Y: tl.constexpr,
    TILING: tl.constexpr,
):
    n, tile = sample_of(SAMPLES_Y), tl.program_id(0).to(tl.int64)
    if n >= samples:
        return
    VECTORS: tl.constexpr = field(TILING, "vectors")

    # A row that lies on the device may be out of range: it is brought into the table, and -1 told.
    given = of_sample(steps_ptr, n * steps_stride, step)
    in_range = (given >= 0) & (given < num_rows)
    step = tl.where(in_range, given, num_rows - 1)
    rows_ptr += 9 * step
    r, c_x, c_m = tl.load(rows_ptr), tl.load(rows_ptr + 1), tl.load(rows_ptr + 2)
    b_0, b_x, b_m = tl.load(rows_ptr + 3), tl.load(rows_ptr + 4), tl.load(rows_ptr + 5)
    sigma = tl.load(rows_ptr + 6)
    noisy = sigma != 0

    x = load(x_ptr, n, tile, channels, pixels, lanes, TILING)
    if VARIANCE == "none":
        m = load(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
    else:
        m, v = load_halves(model_output_ptr, n, tile, channels, pixels, lanes, TILING)
    if model_output_uncond_ptr is not None:
        if VARIANCE == "none":
            u = load(model_output_uncond_ptr, n, tile, channels, pixels, lanes, TILING)
        else:
            u, _ = load_halves(model_output_uncond_ptr, n, tile, channels, pixels, lanes, TILING)
        scale = of_sample(guidance_scales_ptr, n * guidance_scales_stride, guidance_scale)
    if x0_ptr is not None:
        x0 = load(x0_ptr, n, tile, channels, pixels, lanes, TILING)
    if noise_ptr is None:
        index = (tl.load(timesteps_ptr + step) | (stream << 24)).to(tl.uint32)
        seed, sample_id = of_sample(seeds_ptr, n, seed), of_sample(sample_ids_ptr, n, n)
        z = draw(tile, pixels, index, seed, sample_id, TILING)
    else:
        z = load(noise_ptr, n, tile, channels, pixels, lanes, TILING)

    results, clipped = (), ()
    for j in tl.static_range(VECTORS):
        mean = m[j]
        if model_output_uncond_ptr is not None:
            mean = guided(mean, u[j], scale)
        if x0_ptr is None:
            x0_hat = clip(predict_x0(r, c_x, c_m, x[j], mean), lo, hi)
        else:
            x0_hat = clip(x0[j], lo, hi)
        if VARIANCE == "learned":
            deviation = tl.where(noisy, sigma_of(sigma, v[j]), 0.0)
        elif VARIANCE == "learned_range":
            log_var = log_var_between(v[j], tl.load(rows_ptr + 7), tl.load(rows_ptr + 8))
            deviation = tl.where(noisy, sigma_of(sigma, log_var), 0.0)
        else:
            deviation = sigma
        draw_j = z[j]
        if noise_ptr is not None:
            draw_j = tl.where(noisy, draw_j, 0.0)  # where sigma is 0 it may be NaN
        noise = tl.fma(deviation, draw_j, 0.0)  # +0 where sigma is 0, whatever the sign of z
        clipped += (x0_hat,)
        results += (step_to(b_0, b_x, b_m, x0_hat, x[j], mean, noise),)

    store(out_ptr, n, tile, channels, pixels, lanes, results, TILING)
    if out_x0_ptr is not None:
        store(out_x0_ptr, n, tile, channels, pixels, lanes, clipped, TILING)
    if out_lowp_ptr is not None:
        store(out_lowp_ptr, n, tile, channels, pixels, lanes, results, TILING)
    if nan_step_ptr is not None:
        held = holds(tile, channels, pixels, lanes, TILING)
        nan = (results[0] != results[0]) & held
        for j in tl.static_range(1, VECTORS):
            nan = nan | ((results[j] != results[j]) & held)
        wrong = (tl.max(nan.to(tl.int32)) != 0) | (in_range == 0)
        told = tl.where(in_range, step, -1).to(tl.int32)
        tl.atomic_min(nan_step_ptr, told, mask=wrong, sem="relaxed")


def launch_reverse_step(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    x0: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    out_x0: Tensor | None,
    out_lowp: Tensor | None,
    nan_step: Tensor | None,
    layout: tuple[int, int, int, bool],
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    rows: Tensor,
    timesteps: Tensor,
    step: int,
    steps: Tensor | None,
    variance: str,
    clip: tuple[float, float],
    guidance_scale: float,
    guidance_scales: Tensor | None,
) -> None:
    """Fills ``out`` and the outputs that are given; layout: samples, channels, pixels,
    channels_last, of all tensors of x's size alike."""
    samples, channels, pixels, channels_last = layout
    if samples * channels * pixels == 0:
        return
    vector = vector_of([x, model_output, x0, noise, out_x0, out_lowp])
    tiling, lanes, num_warps = how = cut(channels, pixels, channels_last, vector)
    reverse_step_tile_kernel[how.grid(samples)](
        x,
        model_output,
        model_output_uncond,
        x0,
        noise,
        out,
        out_x0,
        out_lowp,
        nan_step,
        seed,
        seeds,
        sample_ids,
        stream,
        rows,
        timesteps,
        rows.shape[0],
        step,
        steps,
        0 if steps is None else steps.ndim,
        *clip,
        guidance_scale,
        guidance_scales,
        0 if guidance_scales is None else guidance_scales.ndim,
        samples,
        channels,
        pixels,
        lanes,
        variance,
        SAMPLES_Y,
        tiling,
        num_warps=num_warps,
        **OPTIONS,
    )
