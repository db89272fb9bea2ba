"""reverse_step: p(x_{t-1} | x_t) of any sampler in one pass. Formula: csrc/core/reverse_step.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..schedule import ModelVariance, StepTable
from . import checks
from .reverse_step_run import VARIANCES, formula, run_reverse_step

NO_CLIP = (-math.inf, math.inf)
# Where the ops' inputs of x's size stand among their arguments.
_TENSOR_INPUTS = {"x": 0, "model_output": 1, "model_output_uncond": 12, "noise": 15, "x0": 16}

_INPUTS = (
    "Tensor x, Tensor model_output, Tensor rows, Tensor timesteps, SymInt step, Tensor? steps, "
    "SymInt seed, Tensor? seeds, Tensor? sample_ids, int variance, float lo, float hi, "
    "Tensor? model_output_uncond, float guidance_scale, Tensor? guidance_scales, Tensor? noise, "
    "Tensor? x0"
)
checks.library.define(
    f"reverse_step({_INPUTS}, bool return_x0) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
checks.library.define(
    f"reverse_step_out({_INPUTS}, *, Tensor(a!) out, Tensor(b!)? out_x0, Tensor(c!)? out_lowp, "
    "Tensor(d!)? nan_step) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
    return_x0: bool = False,
    out: Tensor | None = None,
    out_lowp: Tensor | None = None,
    nan_step: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of the reverse process, its noise drawn inside.

    x̂₀ = clip(r · fma(c_m, m, c_x x)),  x′ = fma(b_0, x̂₀, fma(b_x, x, fma(b_m, m, σ z))), the nine
    numbers from row ``step`` of the table (Ho et al. 2020, eqs. 7, 11, 15; Song et al. 2021,
    eq. 12). z is ``randn(x.shape, seed=seed, sample_ids=sample_ids, stream=1, index=t)`` with t the
    row's timestep; where σ = 0, as in the last row, nothing is drawn.

    Args:
        x: [N, C, …] float32, bfloat16 or float16. Contiguous and channels_last are read as they
            lie, other strides are copied first.
        model_output: [N, C, …], of a dtype of its own; [N, 2C, …] where the table's variance is
            "learned" or "learned_range".
        table: NoiseSchedule.step_table's.
        step: row, counted from the first step taken: int, or int64 tensor, 0-d or [N]. A kernel
            reads a tensor's value when it runs, so a captured CUDA graph serves every step.
        seed: in [0, 2^64), or int64 [N].
        sample_ids: N non-negative integers; 0 … N−1 if None.
        clip: bounds of x̂₀; None for no clip. NaN passes.
        model_output_uncond, guidance_scale: m = m_u + s (m_c − m_u); s a number or float32, 0-d
            or [N]. The variance is the conditional output's.
        noise: z itself, of x's shape; then seed does not matter.
        x0: takes the place of x̂₀ before the clip, of x's shape.
        return_x0: also return the clipped x̂₀, float32.
        out: where x′ goes, like x; may be x.
        out_lowp: bfloat16 or float16 of x's shape: takes x′ a second time, rounded once.
        nan_step: int32 [1], lowered to the first row whose result holds a NaN; to −1 where a step
            that lies on a GPU is outside the table (the last row is taken).

    Returns:
        x′ of x's dtype and layout, or (x′, x̂₀). Differentiable in x, both model outputs and x0
        unless ``out``, ``out_lowp`` or ``nan_step`` is given.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range.

    >>> table = NoiseSchedule.linear().step_table(prediction="epsilon", variance="fixed_small")
    >>> x = randn([2, 3, 4, 4], seed=0)
    >>> reverse_step(x, torch.zeros_like(x), table, 0, seed=0).shape
    torch.Size([2, 3, 4, 4])
    """
    _check_x(x)
    if not isinstance(table, StepTable):
        raise TypeError(f"table must be a StepTable; got {type(table).__name__}")
    device, samples = x.device, x.shape[0]
    steps = None
    if isinstance(step, Tensor):
        checks.check_tensor("step", step, device, (torch.int64,))
        if step.ndim:
            checks.check_same_shape("step", step, (samples,))
        steps, step = step.contiguous(), 0
    else:
        step = checks.as_int("step", step, len(table))
    variance = table.model_variance
    _check_model_output("model_output", model_output, x, variance)
    scale, scales = 1.0, None
    if (model_output_uncond is None) != (guidance_scale is None):
        raise ValueError("guidance takes model_output_uncond and guidance_scale, both or neither")
    if model_output_uncond is not None:
        _check_model_output("model_output_uncond", model_output_uncond, x, variance)
        if model_output_uncond.dtype != model_output.dtype:
            raise TypeError(
                f"model_output_uncond must be {model_output.dtype}, as model_output is; "
                f"got {model_output_uncond.dtype}"
            )
        if isinstance(guidance_scale, Tensor):
            checks.check_tensor("guidance_scale", guidance_scale, device, (torch.float32,))
            if guidance_scale.ndim:
                checks.check_same_shape("guidance_scale", guidance_scale, (samples,))
            scales = guidance_scale.contiguous()
        else:
            scale = float(guidance_scale)  # type: ignore[arg-type]
    lo, hi = check_clip(clip)
    for name, tensor in (("noise", noise), ("x0", x0)):
        if tensor is not None:
            checks.check_tensor(name, tensor, device, checks.FLOAT_DTYPES)
            checks.check_same_shape(name, tensor, x.shape)
    seed, seeds, ids = checks.noise_address(seed, sample_ids, samples, device)
    table = table.to(device)
    inputs = (
        x,
        model_output,
        table.rows,
        table.timesteps,
        step,
        steps,
        seed,
        seeds,
        ids,
        VARIANCES.index(variance),
        lo,
        hi,
        model_output_uncond,
        scale,
        scales,
        noise,
        x0,
    )
    run_now = checks.runs_now(x, model_output, model_output_uncond, noise, x0)
    if out is None and out_lowp is None and nan_step is None:
        run = _reverse_step if run_now else torch.ops.ddpm_fast.reverse_step.default
        result, clipped = run(*inputs, return_x0)
        return (result, clipped) if return_x0 else result

    if _needs_grad(x, model_output, model_output_uncond, x0, out, out_lowp):
        raise ValueError(
            "out, out_lowp and nan_step cannot be differentiated through: leave them out, or call "
            "under torch.no_grad()"
        )
    if out is None:
        out = checks.empty_like_dense(x, x.dtype)
    else:
        _check_out("out", out, x, (x.dtype,))
    if out_lowp is not None:
        _check_out("out_lowp", out_lowp, x, (torch.bfloat16, torch.float16))
    if nan_step is not None:
        checks.check_tensor("nan_step", nan_step, device, (torch.int32,))
        checks.check_same_shape("nan_step", nan_step, (1,))
    out_x0 = checks.empty_like_dense(x, torch.float32) if return_x0 else None
    if run_now:
        _reverse_step_out(*inputs, out=out, out_x0=out_x0, out_lowp=out_lowp, nan_step=nan_step)
    else:
        torch.ops.ddpm_fast.reverse_step_out.default(
            *inputs, out=out, out_x0=out_x0, out_lowp=out_lowp, nan_step=nan_step
        )
    return (out, out_x0) if out_x0 is not None else out


def check_clip(clip: tuple[float, float] | None) -> tuple[float, float]:
    """The bounds as numbers, ±∞ for None; raises ValueError unless lo <= hi."""
    if clip is None:
        return NO_CLIP
    try:
        lo, hi = clip
        if lo <= hi:
            return lo + 0.0, hi + 0.0  # no bound is -0
    except (TypeError, ValueError):
        pass
    raise ValueError(f"clip must be (lo, hi) with lo <= hi, or None; got {clip}")


def _check_x(x: Tensor) -> None:
    checks.check_tensor("x", x, getattr(x, "device", None), checks.FLOAT_DTYPES)
    checks.check_batch("x", x.shape)


def _check_model_output(name: str, output: Tensor, x: Tensor, variance: ModelVariance) -> None:
    checks.check_tensor(name, output, x.device, checks.FLOAT_DTYPES)
    if variance == "none":
        checks.check_same_shape(name, output, x.shape)
        return
    if x.ndim < 2:
        raise ValueError(f"x must have channels on dimension 1; got {list(x.shape)}")
    expected = [x.shape[0], 2 * x.shape[1], *x.shape[2:]]
    if list(output.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected}, twice x's channels, where the variance is "
            f"{variance}; got {list(output.shape)}"
        )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_out(name: str, out: Tensor, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if out is x and x.is_contiguous():
        return
    checks.check_tensor(name, out, x.device, dtypes)
    checks.check_same_shape(name, out, x.shape)
    if out.stride() == x.stride() and x.is_contiguous():
        return
    channels_last = not x.is_contiguous() and checks.is_channels_last(x)
    layout = checks.layout_of(out)
    if layout is None or (layout[3] != channels_last and not out.is_contiguous()):
        order = "channels_last" if channels_last else "contiguous"
        raise ValueError(f"{name} must be {order}, as x is or is made; got strides {out.stride()}")


def _new_outputs(x: Tensor, return_x0: bool) -> tuple[Tensor, Tensor]:
    out = checks.empty_like_dense(x, x.dtype)
    if return_x0:
        return out, checks.empty_like_dense(x, torch.float32)
    return out, x.new_empty(0, dtype=torch.float32)  # an op returns a fixed number of tensors


@torch.library.impl(checks.library, "reverse_step", "CompositeExplicitAutograd")
def _reverse_step(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, return_x0 = args
    out, out_x0 = _new_outputs(x, return_x0)
    run_reverse_step(x, *inputs, out=out, out_x0=out_x0 if return_x0 else None)
    return out, out_x0


@torch.library.register_fake("ddpm_fast::reverse_step", lib=checks.library)
def _reverse_step_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(x, args[-1])


@torch.library.impl(checks.library, "reverse_step_out", "CompositeExplicitAutograd")
def _reverse_step_out(*inputs: Any, **outputs: Any) -> None:
    x, out, out_lowp = inputs[0], outputs["out"], outputs["out_lowp"]
    for written, tensor in (("out", out), ("out_lowp", out_lowp)):
        if tensor is None or tensor is x:
            continue
        for name, i in _TENSOR_INPUTS.items():
            checks.check_overlap(written, tensor, name, inputs[i])
    if out_lowp is not None:
        checks.check_overlap("out_lowp", out_lowp, "out", out)
    run_reverse_step(*inputs, **outputs)
    for written in (out, out_lowp, outputs["nan_step"]):
        if written is not None and not written.is_inference():
            increment_version(written)  # what autograd saved of it is no longer there


@torch.library.register_fake("ddpm_fast::reverse_step_out", lib=checks.library)
def _reverse_step_out_fake(*inputs: Any, **outputs: Any) -> None:
    return None


_DIFFERENTIABLE = [i for name, i in _TENSOR_INPUTS.items() if name != "noise"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]


@checks.once_differentiable
def _backward(ctx: Any, grad: Tensor, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates the reference formula in float64, with the same noise redrawn."""
    saved = iter(ctx.saved_tensors)
    inputs = [
        next(saved) if tensor else value
        for value, tensor in zip(ctx.inputs, ctx.is_tensor, strict=True)
    ]
    return_x0 = inputs.pop()
    wanted = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
    doubles = list(inputs)
    for i in _DIFFERENTIABLE:
        if doubles[i] is not None:
            doubles[i] = doubles[i].detach().double().requires_grad_(i in wanted)
    (x, model_output, rows, timesteps, step, steps, seed, seeds, ids, variance, lo, hi) = doubles[
        :12
    ]
    uncond, scale, scales, noise, x0 = doubles[12:]
    if scales is None:
        scales = torch.full((), scale, dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        results = formula(
            x,
            model_output,
            rows,
            timesteps,
            step,
            steps,
            (seed, seeds, ids),
            VARIANCES[variance],
            (lo, hi),
            uncond,
            scales,
            noise,
            x0,
        )
        outputs, grads = [results[0]], [grad.double()]
        if return_x0:
            outputs.append(results[1])
            grads.append(grad_x0.double())
        found = torch.autograd.grad(outputs, [doubles[i] for i in wanted], grads, allow_unused=True)
    answer: list[Tensor | None] = [None] * (len(inputs) + 1)
    for i, gradient in zip(wanted, found, strict=True):
        answer[i] = None if gradient is None else gradient.to(inputs[i].dtype)
    return tuple(answer)


torch.library.register_autograd(
    "ddpm_fast::reverse_step", _backward, setup_context=_setup_context, lib=checks.library
)
