"""group_norm_silu: group normalisation with the residual, the embedding, scale and shift before and
after it, and the SiLU. Formula: csrc/core/group_norm_silu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import checks
from . import group_norm_silu_formulas as formulas
from .group_norm_silu_backward import GroupNormSilu, setup_context, traced_backward
from .group_norm_silu_formulas import Affine
from .group_norm_silu_out import check_out, check_overlap
from .group_norm_silu_run import lies_channels_last, run_forward

_ARGUMENTS = (
    "Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? emb, "
    "Tensor? scale, Tensor? shift, Tensor? residual, bool silu"
)
checks.library.define(
    f"group_norm_silu({_ARGUMENTS}, bool with_statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
checks.library.define(
    f"group_norm_silu_out({_ARGUMENTS}, *, Tensor(a!) out, Tensor(b!)? sum_out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    emb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """z · σ(z), z = norm(x + residual + emb) · (1 + scale) + shift (Wu & He 2018; Dhariwal &
    Nichol 2021, section 4): each step of a UNet between two convolutions, in one pass.

    Statistics are in float32, and the same bits whatever the batch and the number of threads.
    A 4-d x whose channels lie side by side is read where it is, with gaps between pixels or rows;
    anything else that is neither contiguous nor channels_last is copied first.

    Args:
        x: [N, C, …] float32, bfloat16 or float16.
        num_groups: of channels; divides C.
        weight, bias: [C], float32 or x's dtype.
        eps: added to the variance.
        emb, scale, shift: [N, C] or [1, C], float32 or x's dtype; halves of a larger tensor are
            read as they lie.
        residual: of x's shape and dtype; the sum is rounded to it.
        silu: False leaves the SiLU out.
        out: takes the result, where nothing is differentiated: x's shape and dtype, contiguous as x
            is, or, with a channels_last x, channels side by side and any gaps between pixels and
            rows, such as the interior of a padded tensor.

    Returns:
        Like x, in its layout; with a residual also x + residual. Differentiable in every tensor:
        once by a kernel; further (``create_graph=True``; not of what torch.compile has made, which
        PyTorch differentiates once), in forward mode and under torch.func's transforms by the
        formula in PyTorch.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; an out that
            overlaps x or the residual in part, or another argument at all.

    >>> x = torch.randn(2, 32, 8, 8)
    >>> group_norm_silu(x, 8, torch.ones(32), torch.zeros(32)).shape
    torch.Size([2, 32, 8, 8])
    """
    affine = Affine(weight, bias, emb, scale, shift)
    num_groups, eps = _check(x, num_groups, affine, eps, residual)
    arguments = (x, num_groups, weight, bias, eps, emb, scale, shift, residual, bool(silu))
    tensors = (x, *affine, residual)
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if out is not None:
        return _into(out, arguments, wants_gradient)
    if not torch.compiler.is_compiling() and checks.is_functional():
        y, sum_out = formulas.plain(x, num_groups, affine, eps, residual, silu)
    elif not checks.is_eager(*tensors):
        op = torch.ops.ddpm_fast.group_norm_silu.default
        y, sum_out, _, _ = op(*arguments, wants_gradient)
    else:
        y, sum_out = unchecked(*arguments)
    return y if residual is None else (y, sum_out)


def unchecked(x: Tensor, num_groups: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and x + residual of plain tensors that have passed all checks, arguments as the op's."""
    if torch.is_grad_enabled() and (
        x.requires_grad or any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    ):
        y, sum_out = GroupNormSilu.apply(_group_norm_silu, x, num_groups, *arguments)
    else:
        weight, bias, eps, emb, scale, shift, residual, silu = arguments
        y = _empty_like(x)
        sum_out = y if residual is None else _empty_like(x)
        affine = Affine(weight, bias, emb, scale, shift)
        s = None if residual is None else sum_out
        run_forward(x, num_groups, affine, eps, residual, silu, y, s, None, None)
    return y, sum_out


def _into(
    out: Tensor, arguments: tuple[Any, ...], wants_gradient: bool
) -> Tensor | tuple[Tensor, Tensor]:
    x, residual = arguments[0], arguments[8]
    if wants_gradient or (torch.is_grad_enabled() and out.requires_grad):
        raise ValueError(
            "out cannot be differentiated through: leave it out, or call under torch.no_grad()"
        )
    check_out(out, x)
    sum_out = None if residual is None else _empty_like(x)
    if checks.is_eager(x, *arguments[2:4], *arguments[5:9], out):
        _group_norm_silu_out(*arguments, out=out, sum_out=sum_out)
    else:
        torch.ops.ddpm_fast.group_norm_silu_out.default(*arguments, out=out, sum_out=sum_out)
    return out if sum_out is None else (out, sum_out)


def _check(
    x: Tensor, num_groups: int, affine: Affine, eps: float, residual: Tensor | None
) -> tuple[int, float]:
    checks.check_tensor("x", x, getattr(x, "device", None), checks.FLOAT_DTYPES)
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, …]; got {list(x.shape)}")
    samples, channels = x.shape[:2]
    num_groups = checks.as_int("num_groups", num_groups, 1 << 31)
    if num_groups == 0 or channels % num_groups:
        raise ValueError(f"num_groups must divide x's {channels} channels; got {num_groups}")
    if isinstance(eps, bool) or not isinstance(eps, float | int):
        raise TypeError(f"eps must be a number; got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number from 0 on; got {eps}")
    dtypes = (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)
    for name, tensor in affine._asdict().items():
        if tensor is None:
            continue
        checks.check_tensor(name, tensor, x.device, dtypes)
        if name in ("weight", "bias"):
            checks.check_same_shape(name, tensor, (channels,))
        elif tensor.ndim != 2 or tensor.shape[1] != channels or tensor.shape[0] not in (1, samples):
            raise ValueError(
                f"{name} must have shape {[samples, channels]} or {[1, channels]}; "
                f"got {list(tensor.shape)}"
            )
    if residual is not None:
        checks.check_tensor("residual", residual, x.device, (x.dtype,))
        checks.check_same_shape("residual", residual, tuple(x.shape))
    return num_groups, float(eps)


def _empty_like(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return torch.empty_like(x)
    return checks.empty_laid_out(x.shape, lies_channels_last(x), x.dtype, x.device)


def _outputs(
    x: Tensor, num_groups: int, residual: Tensor | None, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual, mean and rstd; empty where there is none: an op returns a fixed number."""
    nothing = x.new_empty(0)
    mean, rstd = (
        x.new_empty((x.shape[0], num_groups) if with_statistics else 0, dtype=torch.float32)
        for _ in range(2)
    )
    return _empty_like(x), nothing if residual is None else _empty_like(x), mean, rstd


@torch.library.impl(checks.library, "group_norm_silu", "CompositeExplicitAutograd")
def _group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    emb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(x, num_groups, residual, with_statistics)
    y, sum_out, mean, rstd = outputs
    run_forward(
        x,
        num_groups,
        Affine(weight, bias, emb, scale, shift),
        eps,
        residual,
        silu,
        y,
        None if residual is None else sum_out,
        mean if with_statistics else None,
        rstd if with_statistics else None,
    )
    return outputs


@torch.library.register_fake("ddpm_fast::group_norm_silu", lib=checks.library)
def _group_norm_silu_fake(
    x: Tensor, num_groups: int, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, num_groups, arguments[6], arguments[8])


torch.library.register_autograd(
    "ddpm_fast::group_norm_silu", traced_backward, setup_context=setup_context, lib=checks.library
)


@torch.library.impl(checks.library, "group_norm_silu_out", "CompositeExplicitAutograd")
def _group_norm_silu_out(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    emb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    *,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    affine = Affine(weight, bias, emb, scale, shift)
    check_overlap(out, x, residual, affine)
    run_forward(x, num_groups, affine, eps, residual, silu, out, sum_out, None, None)
    if not out.is_inference():
        increment_version(out)  # what autograd saved of it is no longer there


@torch.library.register_fake("ddpm_fast::group_norm_silu_out", lib=checks.library)
def _group_norm_silu_out_fake(*arguments: Any, **outputs: Any) -> None:
    return None
