"""What the ops of the training objective share: arguments, and gradients made going forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..schedule import NoiseSchedule, Prediction, Variance, one_of
from . import checks
from .add_noise import X0_DTYPES

# Elements of a sample whose share of a sum takes one float of a GPU's scratch memory, at least.
SCRATCH_ELEMENTS = 128


# Where ε is drawn: seed, seeds, sample_ids, stream, index, indices.
Address = tuple[int, Tensor | None, Tensor | None, int, int, Tensor | None]


def noise_address(
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None,
    stream: int,
    index: int | Tensor,
    samples: int,
    device: torch.device,
) -> Address:
    """The checked address of one draw a sample."""
    seed, seeds, ids = checks.noise_address(seed, sample_ids, samples, device)
    stream, index, indices = checks.noise_draw(stream, index, samples, device)
    return seed, seeds, ids, stream, index, indices


def timesteps(
    t: int | Tensor, schedule: NoiseSchedule, samples: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """One timestep for all, or int64 [N] of them."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    if isinstance(t, Tensor):
        checks.per_sample_int("t", t, samples, device)
        return 0, t.contiguous()
    return checks.as_int("t", t, len(schedule)), None


def check_model_output(
    model_output: Tensor, prediction: Prediction, variance: Variance
) -> tuple[torch.Size, bool]:
    """The shape of x_0 that goes with a model's output, and whether that has a second half."""
    one_of("prediction", prediction, Prediction)
    one_of("variance", variance, Variance)
    device = getattr(model_output, "device", None)
    checks.check_tensor("model_output", model_output, device, checks.FLOAT_DTYPES)
    shape = model_output.shape
    checks.check_batch("model_output", shape)
    if variance in ("fixed_small", "fixed_large"):
        return shape, False
    if len(shape) < 2 or shape[1] % 2:
        raise ValueError(
            f"model_output must have an even number of channels on dimension 1, half of them for "
            f"the variance, which is {variance}; got {list(shape)}"
        )
    return torch.Size([shape[0], shape[1] // 2, *shape[2:]]), True


def check_x0(x0: Tensor, shape: torch.Size, device: torch.device) -> None:
    checks.check_tensor("x0", x0, device, X0_DTYPES)
    _check_no_gradient("x0", x0)
    checks.check_same_shape("x0", x0, shape)


def check_noise(noise: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if noise is not None:
        checks.check_tensor("noise", noise, device, checks.FLOAT_DTYPES)
        _check_no_gradient("noise", noise)
        checks.check_same_shape("noise", noise, shape)


def sample_weights(
    name: str, weights: Tensor | None, samples: int, device: torch.device
) -> Tensor | None:
    if weights is None:
        return None
    checks.check_tensor(name, weights, device, (torch.float32,))
    _check_no_gradient(name, weights)
    checks.check_same_shape(name, weights, (samples,))
    return weights.contiguous()


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but only model_output is differentiated by: detach it, or "
            "multiply the result"
        )


def check_values_on_host(address: Address, t: int, ts: Tensor | None, num_steps: int) -> None:
    """Raises ValueError for ids, indices and timesteps out of range, where they lie on the host."""
    _, _, sample_ids, _, _, indices = address
    checks.check_ids_on_host(sample_ids)
    if indices is not None:
        checks.check_range_on_host("index", indices, checks.MAX_INDEX)
    if ts is None:
        checks.as_int("t", t, num_steps)
    else:
        checks.check_range_on_host("t", ts, num_steps)


def reference_noise(
    address: Address, noise: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor:
    """ε as float32: what was given, or what lies at the address."""
    if noise is not None:
        return noise.float()
    seed, seeds, ids, stream, index, indices = address
    seeds, ids = checks.reference_address(seed, seeds, ids, shape[0], device)
    draws = torch.full_like(ids, index) if indices is None else indices & (checks.MAX_INDEX - 1)
    return reference.randn(shape, seeds, ids, stream << 24 | draws)


def reference_timesteps(
    t: int, ts: Tensor | None, num_steps: int, samples: int, device: torch.device
) -> Tensor:
    """int64 [N]; those past the ends are T−1, as the kernels on a GPU take them."""
    if ts is None:
        return torch.full((samples,), t, dtype=torch.int64, device=device)
    return torch.where((ts < 0) | (ts >= num_steps), num_steps - 1, ts)


def unit(x0: Tensor) -> Tensor:
    """x_0 as float32 in [-1, 1]."""
    return reference.unit_from_pixel(x0) if x0.dtype == torch.uint8 else x0.float()


def wants_gradient(model_output: Tensor) -> bool:
    """Whether to make the gradient in the same pass."""
    return torch.is_grad_enabled() and model_output.requires_grad


def model_layout(model_output: Tensor, doubled: bool) -> tuple[Tensor, tuple[int, int, int, bool]]:
    """A model's output as a kernel reads it, and the layout of one half of it."""
    model_output, (samples, channels, pixels, last) = checks.dense(model_output)
    return model_output, (samples, channels // 2 if doubled else channels, pixels, last)


def scratch(layout: tuple[int, int, int, bool], sums: int, device: torch.device) -> Tensor | None:
    """Where a GPU's blocks leave their shares of each sample's sums; the CPU needs none."""
    if device.type == "cpu":
        return None
    samples, channels, pixels, _ = layout
    shares = -(-channels * pixels // SCRATCH_ELEMENTS)
    return torch.empty(samples * shares * sums, dtype=torch.float32, device=device)


def run_op(
    op: Callable[..., Any],
    kernel: Callable[..., Any],
    model_output: Tensor,
    others: tuple[Tensor | None, ...],
    headroom: int,
    *arguments: Any,
    kept: type[torch.autograd.Function] | None = None,
) -> Any:
    """The op, by the shortest way that there is.

    others: what else of its arguments is of the model's size; headroom: gradient_scale()'s; kept:
    what takes the kernel's gradient, KeptGradient if None.
    """
    arguments = (*arguments, wants_gradient(model_output), gradient_scale(model_output, headroom))
    if not checks.is_eager(model_output, *others):
        return op(model_output, *arguments)
    if arguments[-2]:
        return (kept or KeptGradient).apply(model_output, kernel, *arguments)
    return kernel(model_output, *arguments)


def gradient_scale(model_output: Tensor, headroom: int) -> float:
    """What a gradient is multiplied by while it is kept: a power of two near the number of
    elements, by which a mean divides, where float16 would lose the digits of what is left; else 1.

    headroom: of how many powers of two less, for losses that may be large.
    """
    if model_output.dtype != torch.float16:
        return 1.0
    return 2.0 ** max(model_output.numel().bit_length() - 1 - headroom, 0)


class KeptGradient(torch.autograd.Function):
    """An op's results and the gradient that it made, without torch's dispatcher: the wrapper that
    ``register_autograd`` puts around an op takes 90 µs of the host a step."""

    @staticmethod
    def forward(
        ctx: Any, model_output: Tensor, kernel: Callable[..., tuple[Tensor, ...]], *arguments: Any
    ) -> tuple[Tensor, ...]:
        results = kernel(model_output, *arguments)
        keep_gradient(ctx, results, arguments[-1], 2 + len(arguments))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return from_kept_gradient(ctx, *upstream)


class KeptHalves(torch.autograd.Function):
    """KeptGradient of a kernel that returns a sum, its two terms and the sum's gradient, each
    term's in one half of the model's channels."""

    @staticmethod
    def forward(
        ctx: Any, model_output: Tensor, kernel: Callable[..., tuple[Tensor, ...]], *arguments: Any
    ) -> tuple[Tensor, ...]:
        results = kernel(model_output, *arguments)
        ctx.scale, ctx.inputs = arguments[-1], 2 + len(arguments)
        ctx.save_for_backward(results[-1])
        ctx.mark_non_differentiable(results[-1])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @checks.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        of_sum, of_first, of_second, _ = upstream
        if of_first is None and of_second is None:
            return from_kept_gradient(ctx, of_sum)
        (gradient,) = ctx.saved_tensors
        none = torch.zeros((), device=gradient.device)
        first, second = (
            (none if of_sum is None else of_sum) + (none if of_term is None else of_term)
            for of_term in (of_first, of_second)
        )
        factors = torch.stack(torch.broadcast_tensors(first, second), 1) / ctx.scale  # [N, 2]
        halves = gradient.unflatten(1, (2, gradient.shape[1] // 2))
        scaled = halves * factors.reshape(*factors.shape, *[1] * (gradient.ndim - 1))
        return (scaled.flatten(1, 2).to(gradient.dtype), *[None] * (ctx.inputs - 1))


def keep_gradient(ctx: Any, results: tuple[Tensor, ...], scale: float, inputs: int) -> None:
    """For the backward pass of an op: its results are a loss, others, and ``scale`` times the
    gradient of the loss by the first of so many inputs."""
    ctx.scale, ctx.inputs = scale, inputs
    ctx.save_for_backward(results[-1])
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)


@checks.once_differentiable
def from_kept_gradient(
    ctx: Any, upstream: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of an op's inputs, given that of the loss of each sample, [N].

    Where that is 1 throughout, as after ``loss.sum()``, and may be looked at without waiting, the
    kept gradient is the answer; elsewhere it takes a pass to scale it.
    """
    nothing = [None] * (ctx.inputs - 1)
    if upstream is None:
        return (None, *nothing)
    (gradient,) = ctx.saved_tensors
    if ctx.scale == 1.0 and _are_ones(upstream):
        return (gradient, *nothing)
    factor = (upstream / ctx.scale).reshape(-1, *[1] * (gradient.ndim - 1))
    return ((gradient * factor).to(gradient.dtype), *nothing)


def _are_ones(upstream: Tensor) -> bool:
    """Whether every value is 1; False where that would take a wait or cannot be known."""
    if upstream.device.type != "cpu" or not checks.is_eager_upstream(upstream):
        return False
    if upstream.stride() == (0,) and upstream.numel():  # of a sum
        return upstream[0].item() == 1
    return bool((upstream == 1).all())
