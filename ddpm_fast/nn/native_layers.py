"""A UNet's layers as calls of the native kernels on fixed memory, for the plan on a CPU.

Images are float32 [n, h, w, c]. A call is made once, with the addresses it works on, and then run
at every step with the residual blocks' rows (nn/time_table.py) and a number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import DTYPES, native
from ..ops.group_norm_silu_run import cpu_chunks

BLOCK = 32  # output channels side by side in packed weights: kConvBlock of csrc/core/conv2d.h

Call = Callable[[Sequence[Tensor], int], None]  # (rows, threads)

# G of F(2×2, 3×3), Lavin & Gray 2016, section 4.1
_WINOGRAD = torch.tensor(
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64
)
# The same with the columns that a doubled image has twice
_WINOGRAD_DOUBLED = torch.tensor(
    [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64
)
# Which of a column's three weights fall on each of two neighbouring pixels of an image whose pixels
# are repeated, by parity.
_PHASES = torch.tensor(
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64
)


class Workspace:
    """Memory of a program's images: what was given back is the next to be taken."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._taken: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def take(self, n: int, h: int, w: int, c: int) -> Tensor:
        """An image [n, h, w, c] of any contents."""
        return self._take((n * h * w * c,), torch.empty, n * h * w * c).view(n, h, w, c)

    def take_padded(self, n: int, h: int, w: int, c: int) -> Tensor:
        """Zeros around the image that :func:`inside` cuts out; sides rounded up to even ones."""
        # Kept for images of these very sides, whose zeros are where they were
        return self._take((n, h, w, c), torch.zeros, n, h + h % 2 + 2, w + w % 2 + 2, c)

    def _take(self, key: tuple[int, ...], new: Callable[..., Tensor], *shape: int) -> Tensor:
        free = self._free.setdefault(key, [])
        tensor = free.pop() if free else new(shape, dtype=torch.float32)
        self._taken[tensor.data_ptr()] = key, tensor
        return tensor

    def give(self, image: Tensor) -> None:
        """Back, if it is one that was taken: what begins elsewhere is part of one."""
        found = self._taken.pop(image.data_ptr(), None)
        if found is not None:
            key, tensor = found
            self._free[key].append(tensor)


def inside(padded: Tensor, h: int, w: int) -> Tensor:
    """The image that the zeros lie around."""
    return padded[:, 1 : h + 1, 1 : w + 1]


class Conv:
    """A convolution, or a linear map of each pixel, with packed weights."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        phases: bool = False,
        winograd: bool = False,
    ) -> None:
        weight = weight.detach()
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        self.c_out, self.c_in, self.kernel = weight.shape[:3]
        self.stride, self.phases, self.winograd = stride, phases, winograd
        if winograd:
            self.weights = _packed(_combined(weight, _WINOGRAD_DOUBLED if phases else _WINOGRAD))
        elif phases:
            kernels = [_combined(weight, down, right) for down in _PHASES for right in _PHASES]
            self.weights = torch.stack([_packed(kernel) for kernel in kernels])
        else:
            self.weights = _packed(weight)
        self.bias = None if bias is None else _owned(bias)

    def call(
        self, x: Tensor, y: Tensor, *, row: int | None = None, residual: Tensor | None = None
    ) -> Call:
        """y = the convolution of x, whose first pixel is the first tap of y's first.

        row: which of the rows is the bias, in place of its own.
        """
        n, rows, cols, _ = y.shape
        assert native is not None
        head = [x.data_ptr(), *_strides(x)]
        head += [0, 0, 0, 0] if residual is None else [residual.data_ptr(), *_strides(residual)]
        head += [y.data_ptr(), *_strides(y), self.weights.data_ptr()]
        kernel = native.winograd_conv2d if self.winograd else native.conv2d
        tail = [n, rows, cols, self.c_in, self.c_out, self.kernel, self.stride, 1]
        if self.phases:
            tail = [n, rows // 2, cols // 2, self.c_in, self.c_out, 2, 1, 4]
        memory = x, y, residual, self.weights, self.bias
        if row is None:
            tail = [0 if self.bias is None else self.bias.data_ptr(), 0, *tail]
        return _NativeCall(kernel, memory, tuple(head), tuple(tail), row, _address)


@dataclass(frozen=True, slots=True)
class _NativeCall:
    """A kernel with its arguments but for the threads, and the memory that their addresses mean.

    Attributes:
        head, tail: the arguments before and after ``of_row``'s.
        row: which of the rows is an argument, or None.
        of_row: the addresses and strides that a row stands for.
    """

    kernel: Callable[..., None]
    memory: tuple[Tensor | None, ...]
    head: tuple[Any, ...]
    tail: tuple[Any, ...] = ()
    row: int | None = None
    of_row: Callable[[Tensor], tuple[int, ...]] = tuple

    def __call__(self, rows: Sequence[Tensor], threads: int) -> None:
        if self.row is None:
            self.kernel(*self.head, *self.tail, threads)
        else:
            self.kernel(*self.head, *self.of_row(rows[self.row]), *self.tail, threads)


def _address(row: Tensor) -> tuple[int, int]:
    """Where a row is, and how far from sample to sample: 0 where they share it."""
    return row.data_ptr(), 0 if row.shape[0] == 1 else row.stride(0)


def _halves(row: Tensor) -> tuple[int, int, int, int]:
    """The same of a row's two halves."""
    address, stride = _address(row)
    return address, stride, address + row.shape[1] // 2 * row.element_size(), stride


class Norm:
    """GroupNorm, with SiLU or without."""

    def __init__(self, module: nn.GroupNorm, silu: bool, fused: bool) -> None:
        self.weight, self.bias = (_owned(p) for p in (module.weight, module.bias))
        self.groups, self.eps, self.silu, self.fused = module.num_groups, module.eps, silu, fused

    def call(self, x: Tensor, y: Tensor, *, scale_shift: int | None = None) -> Call:
        """y = the norm of x; scale_shift: which of the rows holds (scale | shift)."""
        if not self.fused:
            return self._plain(x, y, scale_shift)
        n, h, w, c = x.shape
        shape = (n, c, self.groups, h, w, True)
        chunk, chunks, floats = cpu_chunks(shape)
        scratch = torch.empty(floats, dtype=torch.float32)
        head: list[Any] = [x.data_ptr(), *_strides(x), *[0] * 8, y.data_ptr(), *_strides(y)]
        head += [DTYPES[x.dtype], *shape, self.weight.data_ptr(), self.bias.data_ptr(), 0, 0]
        tail: list[Any] = [self.eps, self.silu, 0, 0, scratch.data_ptr(), chunk, chunks]
        memory = x, y, self.weight, self.bias, scratch
        if scale_shift is None:
            tail = [0, 0, 0, 0, *tail]
        assert native is not None
        kernel = native.group_norm_silu
        return _NativeCall(kernel, memory, tuple(head), tuple(tail), scale_shift, _halves)

    def _plain(self, x: Tensor, y: Tensor, scale_shift: int | None) -> Call:
        def run(rows: Sequence[Tensor], _: int) -> None:
            h = F.group_norm(x.movedim(3, 1), self.groups, self.weight, self.bias, self.eps)
            if scale_shift is not None:
                scale, shift = rows[scale_shift][:, :, None, None].chunk(2, 1)
                h = h * (1 + scale) + shift
            y.copy_((F.silu(h) if self.silu else h).movedim(1, 3))

        return run


def attention_call(qkv: Tensor, heads: int, y: Tensor, own: bool) -> Call:
    """y [n, h, w, c] = the attention of qkv [n, h, w, 3 c] over all pixels; own: by our kernel."""
    n, h, w, c = y.shape
    if own:
        assert native is not None
        kernel = native.attention
        places = [at for image in (qkv, y) for at in (image.data_ptr(), *_strides(image)[::2])]
        return _NativeCall(kernel, (qkv, y), (*places, n, h * w, heads, c // heads))
    parts = qkv.view(n, h * w, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    out = y.view(n, h * w, heads, c // heads).transpose(1, 2)

    def run(_: Sequence[Tensor], __: int) -> None:
        out.copy_(F.scaled_dot_product_attention(*parts))

    return run


def copy_call(x: Tensor, y: Tensor) -> Call:
    """y = x."""

    def run(_: Sequence[Tensor], __: int) -> None:
        y.copy_(x)

    return run


def _strides(image: Tensor) -> tuple[int, int, int]:
    return image.stride()[:3]  # type: ignore[return-value]


def _owned(vector: Tensor) -> Tensor:
    """A copy, since kernels are told addresses: a model's memory can be moved under its tensors."""
    return vector.detach().clone(memory_format=torch.contiguous_format)


def _combined(weight: Tensor, down: Tensor, right: Tensor | None = None) -> Tensor:
    """down g rightᵀ of each 3×3 kernel g, float64 [c_out, c_in, a, b]; the one matrix is both."""
    right = down if right is None else right
    combined = weight.double().flatten(2) @ torch.kron(down, right).T
    return combined.unflatten(2, (len(down), len(right)))


def _packed(weight: Tensor) -> Tensor:
    """[c_out, c_in, a, b] as float32 [blocks, a b, c_in, BLOCK], filled up with zeros."""
    c_out, c_in, *taps = weight.shape
    blocks = -(-c_out // BLOCK)
    packed = torch.zeros((blocks * BLOCK, c_in, taps[0] * taps[1]), dtype=torch.float32)
    packed[:c_out] = weight.flatten(2)
    return packed.view(blocks, BLOCK, c_in, -1).permute(0, 3, 2, 1).contiguous()
