"""denoising_loss: what a model is trained by, and its gradient, in one pass. Formula:
csrc/core/denoising_loss.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from .. import reference
from ..backends import DTYPES, kernel_of, select, triton_launcher
from ..schedule import NoiseSchedule, Prediction, Variance
from . import checks, objective
from .add_noise import STREAM

# In the order of Prediction in csrc/core/denoising_loss.h.
PREDICTIONS = get_args(Prediction)

checks.library.define(
    "denoising_loss(Tensor model_output, Tensor? x0, SymInt t, Tensor? ts, Tensor forward_weights, "
    "int prediction, bool doubled, SymInt seed, Tensor? seeds, Tensor? sample_ids, SymInt stream, "
    "SymInt index, Tensor? indices, Tensor? noise, Tensor? weights, bool with_gradient, "
    "float gradient_scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def denoising_loss(
    model_output: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = STREAM,
    index: int | Tensor = 0,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """w · mean((target − m)²) of each sample, the noise in the target redrawn (Ho et al. 2020,
    eq. 14).

    The target is ε, x_0, or v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022), with the ε that
    ``add_noise`` draws at the same address: ``randn(stream=stream, index=index)``. The gradient is
    made in the same pass. The sums take one order, whatever the number of threads and the batch.

    Args:
        model_output: m, [N, C, …] float32, bfloat16 or float16; [N, 2C, …] where ``variance`` is
            "learned" or "learned_range", of which the first half counts.
        t: int64 [N] in 0 … T−1, or one int for all. Values on a GPU are not read back: those past
            the ends are taken as T−1.
        schedule: gives ᾱ.
        prediction: what m predicts: "epsilon", "sample" (x_0) or "v_prediction".
        variance: whether there is a second half of channels.
        seed: in [0, 2^64), or int64 [N].
        sample_ids: N non-negative integers; 0 … N−1 if None.
        stream, index: of ε's draw; index 0 … 2^24−1, or int64 [N].
        x0: [N, C, …] in [-1, 1], float or uint8 pixels; needed unless m predicts ε.
        noise: ε itself; then the address does not matter.
        weights: w, float32 [N]; 1 if None.

    Returns:
        float32 [N]. Differentiable in model_output, once.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range.

    >>> schedule = NoiseSchedule.linear()
    >>> eps = randn([2, 1, 4, 4], seed=0, stream=2)
    >>> denoising_loss(eps, 10, schedule, seed=0).tolist()
    [0.0, 0.0]
    """
    shape, doubled = objective.check_model_output(model_output, prediction, variance)
    device, samples = model_output.device, shape[0]
    t, ts = objective.timesteps(t, schedule, samples, device)
    if x0 is not None:
        objective.check_x0(x0, shape, device)
    elif prediction != "epsilon":
        raise ValueError(f"prediction={prediction!r} needs x0")
    objective.check_noise(noise, shape, device)
    weights = objective.sample_weights("weights", weights, samples, device)
    address = objective.noise_address(seed, sample_ids, stream, index, samples, device)
    losses: Tensor = objective.run_op(
        torch.ops.ddpm_fast.denoising_loss.default,
        _denoising_loss,
        model_output,
        (x0, noise),
        0,
        None if prediction == "epsilon" else x0,
        t,
        ts,
        schedule.forward_weights(device),
        PREDICTIONS.index(prediction),
        doubled,
        *address,
        noise,
        weights,
    )[0]
    return losses


@torch.library.impl(checks.library, "denoising_loss", "CompositeExplicitAutograd")
def _denoising_loss(
    model_output: Tensor,
    x0: Tensor | None,
    t: int,
    ts: Tensor | None,
    forward_weights: Tensor,
    prediction: int,
    doubled: bool,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    noise: Tensor | None,
    weights: Tensor | None,
    with_gradient: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    backend = select(model_output.device)
    address = (seed, seeds, sample_ids, stream, index, indices)
    objective.check_values_on_host(address, t, ts, forward_weights.shape[0])
    losses, gradient = _outputs(model_output, with_gradient)
    model_output, layout = objective.model_layout(model_output, doubled)
    x0 = None if x0 is None else checks.laid_out(x0, layout[3])
    noise = None if noise is None else checks.laid_out(noise, layout[3])
    if backend == "reference":
        _reference(
            model_output, x0, t, ts, forward_weights, prediction, doubled, address, noise, weights,
            gradient_scale, losses, gradient if with_gradient else None,
        )  # fmt: skip
        return losses, gradient
    scratch = objective.scratch(layout, 1, losses.device)
    if backend == "triton":
        triton_launcher("denoising_loss", losses.device)(
            model_output,
            x0,
            noise,
            gradient if with_gradient else None,
            losses,
            scratch,
            layout,
            doubled,
            address,
            forward_weights,
            t,
            ts,
            PREDICTIONS[prediction],
            weights,
            gradient_scale,
        )
        return losses, gradient
    run, where = kernel_of("denoising_loss", backend, losses.device)
    run(
        model_output.data_ptr(),
        DTYPES[model_output.dtype],
        doubled,
        checks.address(x0),
        0 if x0 is None else DTYPES[x0.dtype],
        checks.address(noise),
        0 if noise is None else DTYPES[noise.dtype],
        gradient.data_ptr() if with_gradient else 0,
        gradient_scale,
        losses.data_ptr(),
        checks.address(scratch),
        *layout,
        seed,
        checks.address(seeds),
        checks.address(sample_ids),
        stream,
        index,
        checks.address(indices),
        forward_weights.data_ptr(),
        forward_weights.shape[0],
        t,
        checks.address(ts),
        prediction,
        checks.address(weights),
        *where,
    )
    return losses, gradient


def _reference(
    model_output: Tensor,
    x0: Tensor | None,
    t: int,
    ts: Tensor | None,
    forward_weights: Tensor,
    prediction: int,
    doubled: bool,
    address: objective.Address,
    noise: Tensor | None,
    weights: Tensor | None,
    gradient_scale: float,
    losses: Tensor,
    gradient: Tensor | None,
) -> None:
    m = model_output.float()
    m = m.chunk(2, 1)[0] if doubled else m
    eps = objective.reference_noise(address, noise, m.shape, m.device)
    target = eps
    if x0 is not None:
        target = objective.unit(x0)
        if PREDICTIONS[prediction] == "v_prediction":
            ts = objective.reference_timesteps(t, ts, len(forward_weights), len(losses), m.device)
            signal, sigma = (reference.at(forward_weights[:, i], ts, eps) for i in (0, 1))
            target = reference.fma(signal, eps, -(sigma * target))
    weights = torch.ones_like(losses) if weights is None else weights
    losses.copy_(weights * reference.regression(target, m))
    if gradient is not None:
        of_m = gradient_scale * reference.regression_gradient(target, m, weights)
        gradient.copy_(torch.cat([of_m, torch.zeros_like(of_m)], 1) if doubled else of_m)


def _outputs(model_output: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    losses = model_output.new_empty(model_output.shape[:1], dtype=torch.float32)
    if with_gradient:
        return losses, checks.empty_like_dense(model_output, model_output.dtype)
    return losses, model_output.new_empty(0)  # an op returns a fixed number of tensors


@torch.library.register_fake("ddpm_fast::denoising_loss", lib=checks.library)
def _denoising_loss_fake(model_output: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _outputs(model_output, args[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    objective.keep_gradient(ctx, output, inputs[-1], len(inputs))


torch.library.register_autograd(
    "ddpm_fast::denoising_loss",
    objective.from_kept_gradient,
    setup_context=_setup_context,
    lib=checks.library,
)
