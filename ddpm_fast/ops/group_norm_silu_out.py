"""Where group_norm_silu may write: what out must be like, and what may lie in its place."""

from __future__ import annotations

import math

from torch import Tensor

from . import checks
from .group_norm_silu_formulas import Affine
from .group_norm_silu_run import lies_channels_last


def check_out(out: Tensor, x: Tensor) -> None:
    checks.check_tensor("out", out, x.device, (x.dtype,))
    checks.check_same_shape("out", out, tuple(x.shape))
    if out.is_contiguous():
        fits = not lies_channels_last(x) or x.shape[1] == 1
    else:
        fits = lies_channels_last(out) and (x.ndim != 4 or _apart(out))
        fits = fits and (
            lies_channels_last(x)
            or x.is_contiguous(memory_format=checks.memory_format(x.ndim, channels_last=True))
        )
    if fits:
        return
    order = "channels_last" if lies_channels_last(x) else "contiguous"
    raise ValueError(
        f"out must be {order}, as x is or is made, and no element of it in another's place; got "
        f"strides {out.stride()}"
    )


def _apart(out: Tensor) -> bool:
    """Whether no two elements share their place, of a 4-d tensor whose channels lie together."""
    reach = out.shape[1]
    sides = [(out.shape[i], out.stride(i)) for i in (0, 2, 3)]
    for size, stride in sorted(sides, key=lambda side: side[1]):
        if size > 1 and stride < reach:
            return False
        if size > 1:
            reach = (size - 1) * stride + reach
    return True


def check_overlap(out: Tensor, x: Tensor, residual: Tensor | None, affine: Affine) -> None:
    """x and residual may be out itself, or lie between its pixels; nothing else shares its place,
    as it is read when a part of out is there already."""
    begin = out.data_ptr()
    end = begin + _extent(out)
    for i, tensor in enumerate((x, residual, *affine)):
        if tensor is None or tensor is out:
            continue
        other = tensor.data_ptr()
        if other >= end or (other < begin and other + _extent(tensor) <= begin):
            continue
        if i > 1:
            raise ValueError(f"out must not overlap {affine._fields[i - 2]}")
        if not _is_or_between(out, tensor):
            raise ValueError(f"out must not overlap {('x', 'residual')[i]} in part")


def _is_or_between(out: Tensor, other: Tensor) -> bool:
    """Of two tensors of one shape whose extents overlap."""
    sides = [
        (stride, of_other)
        for size, stride, of_other in zip(out.shape, out.stride(), other.stride(), strict=True)
        if size > 1
    ]
    if any(stride != of_other for stride, of_other in sides):
        return False
    if out.data_ptr() == other.data_ptr():
        return True
    if out.ndim != 4 or (out.shape[1] > 1 and out.stride(1) != 1):
        return False
    # All pixels begin at multiples of one distance
    distance = math.gcd(*(out.stride(i) for i in (0, 2, 3) if out.shape[i] > 1))
    begins = abs(out.data_ptr() - other.data_ptr()) // out.itemsize
    return distance > 0 and out.shape[1] <= begins % distance <= distance - out.shape[1]


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return 0
        last += (size - 1) * stride
    return (last + 1) * tensor.itemsize
