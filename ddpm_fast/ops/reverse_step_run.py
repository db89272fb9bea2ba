"""One reverse step of checked arguments, on the backend that takes them."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .. import reference
from ..backends import DTYPES, kernel_of, select, triton_launcher
from ..schedule import ModelVariance
from . import checks

STREAM = 1  # reverse steps; the index is the timestep being left
VARIANCES = get_args(ModelVariance)


def run_reverse_step(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    timesteps: Tensor,
    step: int,
    steps: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    variance: int,
    lo: float,
    hi: float,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    guidance_scales: Tensor | None,
    noise: Tensor | None,
    x0: Tensor | None,
    *,
    out: Tensor,
    out_x0: Tensor | None = None,
    out_lowp: Tensor | None = None,
    nan_step: Tensor | None = None,
) -> None:
    backend = select(x.device)
    checks.check_ids_on_host(sample_ids)
    if steps is not None:
        checks.check_range_on_host("step", steps, rows.shape[0])
        if steps.ndim:
            checks.check_same_shape("step", steps, x.shape[:1])
    else:
        checks.as_int("step", step, rows.shape[0])
    x, layout = checks.dense(x)
    channels_last = layout[3]
    model_output = checks.laid_out(model_output, channels_last)
    if model_output_uncond is not None:
        model_output_uncond = checks.laid_out(model_output_uncond, channels_last)
    if noise is not None:
        noise = checks.laid_out(noise, channels_last)
    if x0 is not None:
        x0 = checks.laid_out(x0, channels_last)

    if backend == "reference":
        scale = guidance_scales
        if scale is None:
            scale = torch.full((), guidance_scale, dtype=torch.float32, device=x.device)
        result, clipped = formula(
            x.float(),
            model_output.float(),
            rows,
            timesteps,
            step,
            steps,
            (seed, seeds, sample_ids),
            VARIANCES[variance],
            (lo, hi),
            None if model_output_uncond is None else model_output_uncond.float(),
            scale,
            None if noise is None else noise.float(),
            None if x0 is None else x0.float(),
        )
        if nan_step is not None:
            _note_nan(result, step, steps, nan_step)
        for target, value in ((out, result), (out_x0, clipped), (out_lowp, result)):
            if target is not None:
                target.copy_(value)
        return

    if backend == "triton":
        triton_launcher("reverse_step", x.device)(
            x,
            model_output,
            model_output_uncond,
            x0,
            noise,
            out,
            out_x0,
            out_lowp,
            nan_step,
            layout,
            seed,
            seeds,
            sample_ids,
            STREAM,
            rows,
            timesteps,
            step,
            steps,
            VARIANCES[variance],
            (lo, hi),
            guidance_scale,
            guidance_scales,
        )
        return

    kernel, where = kernel_of("reverse_step", backend, x.device)
    kernel(
        x.data_ptr(),
        DTYPES[x.dtype],
        model_output.data_ptr(),
        0 if model_output_uncond is None else model_output_uncond.data_ptr(),
        DTYPES[model_output.dtype],
        0 if x0 is None else x0.data_ptr(),
        0 if x0 is None else DTYPES[x0.dtype],
        0 if noise is None else noise.data_ptr(),
        0 if noise is None else DTYPES[noise.dtype],
        out.data_ptr(),
        0 if out_x0 is None else out_x0.data_ptr(),
        0 if out_lowp is None else out_lowp.data_ptr(),
        0 if out_lowp is None else DTYPES[out_lowp.dtype],
        *layout,
        seed,
        0 if seeds is None else seeds.data_ptr(),
        0 if sample_ids is None else sample_ids.data_ptr(),
        variance,
        lo,
        hi,
        guidance_scale,
        0 if guidance_scales is None else guidance_scales.data_ptr(),
        0 if guidance_scales is None else guidance_scales.ndim,
        rows.data_ptr(),
        timesteps.data_ptr(),
        rows.shape[0],
        step,
        0 if steps is None else steps.data_ptr(),
        0 if steps is None else steps.ndim,
        0 if nan_step is None else nan_step.data_ptr(),
        *where,
    )


def _note_nan(result: Tensor, step: int, steps: Tensor | None, nan_step: Tensor) -> None:
    held = result[:, None].flatten(1).isnan().any(1)  # a sample may be a number
    rows = torch.full_like(held, step, dtype=torch.int32) if steps is None else steps.int()
    none = torch.iinfo(torch.int32).max
    first = torch.where(held, rows, none).amin() if held.numel() else none
    nan_step.clamp_(max=first)


def formula(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    timesteps: Tensor,
    step: int,
    steps: Tensor | None,
    noise_address: tuple[int, Tensor | None, Tensor | None],
    variance: ModelVariance,
    clip: tuple[float, float],
    model_output_uncond: Tensor | None,
    guidance_scale: Tensor,
    noise: Tensor | None,
    x0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """reference.reverse_step in x's dtype, with the noise of the address where none is given."""
    if steps is None:
        steps = torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)
    else:
        steps = steps.expand(x.shape[0])
    if noise is None:
        seeds, ids = checks.reference_address(*noise_address, x.shape[0], x.device)
        draws = STREAM << 24 | timesteps[steps]
        noise = reference.randn(x.shape, seeds, ids, draws)
    return reference.reverse_step(
        x,
        model_output,
        rows,
        steps,
        noise.to(x.dtype),
        variance=variance,
        clip=clip,
        model_output_uncond=model_output_uncond,
        guidance_scale=guidance_scale.to(x.dtype),
        x0=x0,
    )
