"""denoising_loss with less of the host's time and a gradient that can be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import denoising_loss
from ..ops.add_noise import STREAM
from ..ops.checks import is_eager, noise_address
from ..ops.denoising_loss import PREDICTIONS, _denoising_loss
from ..ops.objective import gradient_scale, timesteps
from ..schedule import NoiseSchedule, Prediction
from .noise import Address


def regression_loss(
    output: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    x0: Tensor | None,
    noise: Tensor | None,
    address: Address,
    weights: Tensor,
    total: bool,
) -> Tensor:
    """w · mean((target − m)²) of each sample (Ho et al. 2020, eq. 14), or their sum.

    Args:
        output: m, [N, C, …] float32, bfloat16 or float16, the only input that is differentiated by.
        t: int64 [N].
        x0: like output, float; None where m predicts ε.
        noise: ε, like output; None: what add_noise draws at the address.
        weights: w, float32 [N].
        total: the sum.

    Returns:
        float32 [N] or 0-d.
    """
    data = None if prediction == "epsilon" else x0
    if torch.is_grad_enabled() and output.requires_grad and is_eager(output, data, noise):
        seed, _, sample_ids = noise_address(*address, output.shape[0], output.device)
        _, ts = timesteps(t, schedule, output.shape[0], output.device)
        # float16 holds neither a large weight's gradient nor a mean's share of one: it keeps that
        # of each sample's sum of squares, near m − target, and the backward pass has the weights.
        apart = output.dtype == torch.float16
        scale = gradient_scale(output, output.shape[0].bit_length())
        arguments = (
            data, 0, ts, schedule.forward_weights(output.device), PREDICTIONS.index(prediction),
            False, seed, None, sample_ids, STREAM, 0, None, noise, None if apart else weights, True,
            scale,
        )  # fmt: skip
        loss: Tensor = _Regression.apply(output, arguments, weights, total)
        return loss
    seed, ids = address
    losses = weights * denoising_loss(
        output,
        t,
        schedule,
        prediction=prediction,
        x0=data,
        noise=noise,
        seed=seed,
        sample_ids=ids,
    )
    return losses.sum() if total else losses


class _Regression(torch.autograd.Function):
    """The sum belongs to it: its own backward pass would take as long as a small batch's kernel."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, arguments: tuple[Any, ...], weights: Tensor, total: bool
    ) -> Tensor:
        losses, gradient = _denoising_loss(output, *arguments)  # past the dispatcher: 9 µs
        *_, in_kernel, _, ctx.scale = arguments
        ctx.apart = in_kernel is None
        ctx.save_for_backward(output, gradient, weights)
        if ctx.apart:
            return torch.dot(losses, weights) if total else losses * weights
        result: Tensor = losses.sum() if total else losses
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        output, gradient, weights = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # the gradient's own graph is wanted
        if not twice and not ctx.apart and _is_one(upstream):
            return gradient, None, None, None
        ones = [1] * (output.ndim - 1)
        factor = (upstream * weights / ctx.scale if ctx.apart else upstream).reshape(-1, *ones)
        if not twice:
            return (gradient * factor).to(output.dtype), None, None, None
        # Linear in m: 2 w (m − target) / K of K elements. What is added is 0.
        slope: Any = 2 * len(weights) * ctx.scale / max(output.numel(), 1)
        if not ctx.apart:
            slope = (weights * slope).reshape(-1, *ones)
        change = slope * (output.float() - output.detach().float())
        return ((gradient.float() + change) * factor).to(output.dtype), None, None, None


def _is_one(upstream: Tensor) -> bool:
    """Whether it is the 1 of ``loss.backward()``; False where that would take a wait."""
    return upstream.ndim == 0 and upstream.device.type == "cpu" and upstream.item() == 1
