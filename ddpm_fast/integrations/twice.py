"""A kernel's loss whose gradient can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def twice_differentiable(
    x: Tensor,
    fused: Callable[[Tensor], Tensor],
    formula: Callable[[Tensor], Tensor],
    on_second: Callable[[], None],
) -> Tensor:
    """fused(x), whose gradient by x is the kernel's, or the formula's where a graph of the gradient
    is asked for (``create_graph``).

    Args:
        x: what is differentiated by; nothing else is.
        fused: differentiable once.
        formula: the same in plain PyTorch.
        on_second: called where the formula is taken.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return fused(x)
    result: Tensor = _Twice.apply(x, fused, formula, on_second)
    return result


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fused: Any, formula: Any, on_second: Any) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.result = fused(ctx.leaf)
        ctx.formula, ctx.on_second = formula, on_second
        ctx.save_for_backward(x)
        result: Tensor = ctx.result.detach()
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient's own graph is wanted
            ctx.on_second()
            (x,) = ctx.saved_tensors
            result = ctx.formula(x)
            (gradient,) = torch.autograd.grad(result, x, upstream, create_graph=True)
        else:
            (gradient,) = torch.autograd.grad(ctx.result, ctx.leaf, upstream, retain_graph=True)
        return gradient, None, None, None
