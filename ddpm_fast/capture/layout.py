"""How a tensor lies in memory, which chooses the kernels that read it."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # bytes: the widest that one instruction loads


def shift_of(tensor: Tensor) -> int:
    """How many elements after a multiple of ALIGNED bytes it begins."""
    return tensor.data_ptr() % ALIGNED // tensor.element_size()


def distinct(tensor: Tensor) -> Tensor:
    """Each element once, where expanded ones are one."""
    if 0 not in tensor.stride():
        return tensor
    shape, stride = tensor.shape, tensor.stride()
    return tensor.as_strided(
        [size if step else min(size, 1) for size, step in zip(shape, stride, strict=True)], stride
    )


def overlaps(tensor: Tensor) -> bool:
    """Whether two places may be one element, but for dimensions that are expanded."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride and size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def reach_of(tensor: Tensor) -> int:
    """How many elements lie from its first to its last."""
    return 1 + sum(
        step * max(size - 1, 0) for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def room_for(tensor: Tensor) -> Tensor:
    """For a tensor of the same strides and alignment."""
    shift = shift_of(tensor)
    room = torch.empty(shift + reach_of(tensor), dtype=tensor.dtype, device=tensor.device)
    return room.as_strided(tensor.shape, tensor.stride(), shift)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    kind = integers[a.itemsize]
    return torch.equal(a.view(kind), b.view(kind))  # NaN are equal where their bits are
