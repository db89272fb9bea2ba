"""Tensors that may be spread over processes: their own part, the whole, and filling one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; of an ordinary one, itself."""
    sharded: Any = tensor
    return sharded.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """The tensor on the host, contiguous. All processes call it for a sharded one; what is not to
    be kept here is None."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        sharded: Any = tensor
        tensor = sharded.full_tensor()
    return tensor.to("cpu", memory_format=torch.contiguous_format, copy=True) if keep else None


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded, keeping the target's layout in memory."""
    if not hasattr(target, "full_tensor"):
        target.copy_(source)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    source = source.to(device=local(target).device, dtype=target.dtype)
    local(target).copy_(local(distribute_tensor(source, sharded.device_mesh, sharded.placements)))
