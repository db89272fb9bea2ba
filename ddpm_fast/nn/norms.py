"""The norms of a UNet with what stands around them, in one pass where there is a kernel for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from ..backends import kernels_for
from ..ops import checks
from ..ops.group_norm_silu import unchecked


def norm_silu(
    norm: nn.Module,
    x: Tensor,
    *,
    emb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(norm(x + emb) · (1 + scale) + shift) of x [N, C, H, W], the others [N, C].

    By ``group_norm_silu`` where the norm is a GroupNorm as it was made: no hooks, no other class,
    and neither traced, compiled nor transformed, which are left PyTorch's own operations.
    """
    if not torch.compiler.is_compiling() and _is_plain(norm, x, emb, scale, shift):
        assert isinstance(norm, nn.GroupNorm)
        return unchecked(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, emb, scale, shift, None, silu
        )[0]
    if emb is not None:
        x = x + emb[:, :, None, None]
    x = norm(x)
    if scale is not None and shift is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(x) if silu else x


def _is_plain(norm: nn.Module, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the op does what calling the modules would, seen by nobody."""
    if type(norm) is not nn.GroupNorm or has_hooks(norm) or "forward" in norm.__dict__:
        return False
    weight, bias = norm.weight, norm.bias
    if checks.is_functional() or torch._C._is_tracing() or not isinstance(x, Tensor):
        return False
    if x.dtype not in checks.FLOAT_DTYPES or x.numel() == 0 or x.shape[1] != norm.num_channels:
        return False
    for tensor in (weight, bias, *others):
        if tensor is not None and (
            tensor.dtype not in (torch.float32, x.dtype) or tensor.device != x.device
        ):
            return False
    if any(t is not None and t.shape[0] not in (1, x.shape[0]) for t in others):
        return False  # x is one for all of them
    return checks.is_eager(x, weight, bias, *others) and kernels_for(x.device)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks_of_all._has_any_global_hook()
    )
