"""The gradient of group_norm_silu: two passes by kernels, and between them sums of a few values a
channel in PyTorch. Formula: csrc/core/group_norm_silu.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .group_norm_silu_formulas import Affine
from .group_norm_silu_run import lies_channels_last, run_bwd, run_sums

_ARGUMENTS = (
    "Tensor s, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? emb, Tensor? scale, "
    "Tensor? shift, bool silu"
)
checks.library.define(
    f"group_norm_silu_sums(Tensor dy, {_ARGUMENTS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
checks.library.define(
    f"group_norm_silu_bwd(Tensor dy, Tensor? dsum, {_ARGUMENTS}, Tensor group_means) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _empty_sums(s: Tensor) -> Tensor:
    return s.new_empty(3, *s.shape[:2], dtype=torch.float32)


def _empty_gradient(s: Tensor) -> Tensor:
    return checks.empty_laid_out(s.shape, lies_channels_last(s), s.dtype, s.device)


@torch.library.impl(checks.library, "group_norm_silu_sums", "CompositeExplicitAutograd")
def _group_norm_silu_sums(
    dy: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, *affine_and_silu: Any
) -> Tensor:
    *affine, silu = affine_and_silu
    sums = _empty_sums(s)
    run_sums(dy, s, mean, rstd, Affine(*affine), silu, sums)
    return sums


@torch.library.register_fake("ddpm_fast::group_norm_silu_sums", lib=checks.library)
def _group_norm_silu_sums_fake(dy: Tensor, s: Tensor, *arguments: Any) -> Tensor:
    return _empty_sums(s)


@torch.library.impl(checks.library, "group_norm_silu_bwd", "CompositeExplicitAutograd")
def _group_norm_silu_bwd(
    dy: Tensor, dsum: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor, *others: Any
) -> Tensor:
    *affine, silu, group_means = others
    dx = _empty_gradient(s)
    run_bwd(dy, dsum, s, mean, rstd, Affine(*affine), silu, group_means, dx)
    return dx


@torch.library.register_fake("ddpm_fast::group_norm_silu_bwd", lib=checks.library)
def _group_norm_silu_bwd_fake(
    dy: Tensor, dsum: Tensor | None, s: Tensor, *arguments: Any
) -> Tensor:
    return _empty_gradient(s)


def _gradients(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    silu: bool,
    of_s: bool,
) -> tuple[Tensor | None, Affine]:
    """By s, where that is asked for, and by weight, bias, emb, scale and shift."""
    tensors = (s, mean, rstd, *affine, silu)
    eager = checks.is_eager(*tensors[:-1]) and checks.is_eager_upstream(dy, dsum)
    sums_op, bwd_op = _group_norm_silu_sums, _group_norm_silu_bwd
    if not eager:
        sums_op = torch.ops.ddpm_fast.group_norm_silu_sums.default
        bwd_op = torch.ops.ddpm_fast.group_norm_silu_bwd.default
    weight, bias, emb, scale, shift = affine
    samples, groups = mean.shape
    channels = s.shape[1]
    each, pixels = channels // groups, s.numel() // max(samples * channels, 1)
    sums = sums_op(dy, *tensors)
    # Σ dz and Σ dz·x̂; in float64 for emb's gradient: what is left of its terms may be little
    pair = sums[:2] if emb is None else sums[:2].double()
    if scale is not None:
        pair = pair * (1 + scale.float())
    sloped = (pair if weight is None else pair * weight.float()).view(2, samples, groups, each)
    group_means = sloped.sum(3) / max(each * pixels, 1)
    ds = bwd_op(dy, dsum, *tensors, group_means.float()) if of_s else None
    by_weight = by_bias = by_emb = by_scale = None
    if weight is not None or bias is not None:
        by_bias, by_weight = pair.sum(1).unbind()  # of all samples
    if emb is not None:
        x_hat = sums[2].view(samples, groups, each)  # adds up to 0, but for the mean's rounding
        x_hat = x_hat - x_hat.mean(2, keepdim=True)
        m1, m2 = group_means[:, :, :, None].unbind()
        by_emb = rstd[:, :, None] * (sloped[0] - pixels * m1 - m2 * x_hat)
        by_emb = by_emb.view(samples, channels)
    if scale is not None:
        by_scale = sums[1] if weight is None else sums[1] * weight
        by_scale = by_scale if bias is None else by_scale + sums[0] * bias
    found = (by_weight, by_bias, by_emb, by_scale, sums[0] if shift is not None else None)
    return ds, Affine(*[_like(g, t) for g, t in zip(found, affine, strict=True)])


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the tensor's dtype, [N, C] summed to [1, C] where it has that shape."""
    if gradient is None or tensor is None:
        return None
    if gradient.shape != tensor.shape:
        gradient = gradient.sum(0, keepdim=True)
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)


class GroupNormSilu(torch.autograd.Function):
    """The op without torch's dispatcher: the wrapper that ``register_autograd`` puts around an op
    takes 90 µs of the host a call."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        outputs = kernel(*arguments, True)
        setup_context(ctx, (*arguments, True), outputs)
        return outputs[0], None if arguments[8] is None else outputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return (None, *_differentiable(ctx, dy, dsum))
        return (None, *_by_kernels(ctx, dy, dsum, ctx.needs_input_grad[1:]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, eps, emb, scale, shift, residual, silu, _ = inputs
    _, sum_out, mean, rstd = output
    ctx.num_groups, ctx.eps, ctx.silu = num_groups, eps, silu
    s = x if residual is None else sum_out
    ctx.save_for_backward(s, mean, rstd, weight, bias, emb, scale, shift)
    ctx.with_residual = residual is not None
    ctx.set_materialize_grads(False)


def traced_backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, *others: None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return (*_differentiable(ctx, dy, dsum), None)
    return (*_by_kernels(ctx, dy, dsum, ctx.needs_input_grad), None)


def _by_kernels(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """By each of the op's arguments up to silu."""
    s, mean, rstd, *affine = ctx.saved_tensors
    if dy is None:
        return _as_returned(ctx, dsum, Affine(*[None] * 5))
    of_s = needed[0] or needed[8]
    found = _gradients(dy, dsum, s, mean, rstd, Affine(*affine), ctx.silu, of_s)
    return _as_returned(ctx, *found)


def _differentiable(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same as a graph of PyTorch's operations, for derivatives of derivatives. s is the op's
    own second result where there is a residual, so that its graph leads on to both summands."""
    s, _, _, *affine = ctx.saved_tensors
    if dy is None:
        return _as_returned(ctx, dsum, Affine(*[None] * 5))
    tensors = [s, *affine]
    wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
    with torch.enable_grad():
        # Views, so that the graph of the formula is cut here and goes on from there
        views = [None if t is None else t.view_as(t) for t in tensors]
        wide, weight, bias, emb, scale, shift = (None if t is None else t.float() for t in views)
        assert wide is not None
        y, _ = reference.group_norm_silu(
            wide, ctx.num_groups, weight, bias, eps=ctx.eps, emb=emb, scale=scale, shift=shift,
            silu=ctx.silu,
        )  # fmt: skip
        inputs = [view for i, view in enumerate(views) if i in wanted and view is not None]
        found = torch.autograd.grad(y, inputs, dy.float(), create_graph=True)
    gradients: list[Tensor | None] = [None] * 6
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    if dsum is not None:
        gradients[0] = dsum if gradients[0] is None else gradients[0] + dsum
    return _as_returned(ctx, gradients[0], Affine(*gradients[1:]))


def _as_returned(ctx: Any, ds: Tensor | None, by: Affine) -> tuple[Tensor | None, ...]:
    """In the order of the op's arguments."""
    of_residual = ds if ctx.with_residual else None
    return (ds, None, by.weight, by.bias, None, by.emb, by.scale, by.shift, of_residual, None)
