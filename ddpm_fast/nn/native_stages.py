"""The residual blocks, attentions and changes of resolution of a UNet as native calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AttentionBlock, Downsample, ResBlock, Upsample
from .native_layers import Call, Conv, Norm, Workspace, attention_call, copy_call, inside

_LEAST_WINOGRAD = 16  # channels, under which the transforms cost more than they save


class Recorder(Protocol):
    """Where calls are put down: a program."""

    space: Workspace

    def add(self, call: Call) -> None: ...

    def next_row(self) -> int: ...


def make_stage(module: nn.Module, rewrites: frozenset[str]) -> Stage:
    """Of a part of a UNet that is no identity."""
    if isinstance(module, ResBlock):
        return Res(module, rewrites)
    if isinstance(module, AttentionBlock):
        return Attention(module, rewrites)
    return Resample(module, rewrites)


def make_conv(module: nn.Module, rewrites: frozenset[str], phases: bool = False) -> Conv:
    """Of a convolution, by Winograd's way where that is asked for and worth it."""
    assert isinstance(module, nn.Conv2d)
    plain = (module.kernel_size, module.stride) == ((3, 3), (1, 1))
    wide = min(module.in_channels, module.out_channels) >= _LEAST_WINOGRAD
    return Conv(
        module.weight,
        module.bias,
        stride=module.stride[0],
        phases=phases,
        winograd="winograd" in rewrites and plain and wide,
    )


def make_norm(module: nn.Module, rewrites: frozenset[str], silu: bool) -> Norm | None:
    """Of a GroupNorm; None for the identity."""
    fused = "group_norm_silu" in rewrites
    return Norm(module, silu, fused) if isinstance(module, nn.GroupNorm) else None


def _linear(module: nn.Module, parts: int = 1) -> list[Conv]:
    """A linear map of each pixel, or those that give parts of its outputs."""
    assert isinstance(module, nn.Linear)
    assert module.bias is not None
    weights, biases = module.weight.chunk(parts), module.bias.chunk(parts)
    return [Conv(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def record_norm(
    into: Recorder, norm: Norm | None, x: Tensor, scale_shift: int | None = None
) -> Tensor:
    """The norm of x, with zeros around it."""
    assert norm is not None
    n, h, w, c = x.shape
    padded = into.space.take_padded(n, h, w, c)
    into.add(norm.call(x, inside(padded, h, w), scale_shift=scale_shift))
    return padded


class Res:
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), as nn/blocks.py has it."""

    def __init__(self, block: ResBlock, rewrites: frozenset[str]) -> None:
        self.norm1, self.norm2 = (
            make_norm(norm, rewrites, silu=True) for norm in (block.norm1, block.norm2)
        )
        self.halves = isinstance(block.resample, nn.AvgPool2d)
        self.doubles = isinstance(block.resample, nn.Upsample)
        self.phases = self.doubles and "phase_upsample" in rewrites
        self.conv1, self.conv2 = (
            make_conv(block.conv1, rewrites, self.phases),
            make_conv(block.conv2, rewrites),
        )
        shortcut = block.shortcut
        self.shortcut = make_conv(shortcut, rewrites) if isinstance(shortcut, nn.Conv2d) else None
        self.scale_shift = block.scale_shift
        self.c_out = self.conv2.c_out

    def sides(self, h: int, w: int) -> tuple[int, int]:
        return _sides(h, w, self.halves, self.doubles)

    def record(self, into: Recorder, x: Tensor, y: Tensor) -> None:
        n, h, w, _ = y.shape
        row = into.next_row()
        hidden = into.space.take(n, h, w, self.c_out)
        padded = self._normed(into, x, h, w)
        own = None if not self.scale_shift else row
        conv1_row = None if self.scale_shift else row
        into.add(self.conv1.call(padded, hidden, row=conv1_row))
        into.space.give(padded)
        padded = record_norm(into, self.norm2, hidden, own)
        into.space.give(hidden)
        if self.halves or self.doubles:
            resampled = into.space.take(n, h, w, x.shape[3])
            into.add(_resample_call(x, resampled, self.halves))
            x = resampled
        if self.shortcut is not None:
            into.add(self.shortcut.call(x, y))
        into.add(self.conv2.call(padded, y, residual=x if self.shortcut is None else y))
        into.space.give(padded)
        if self.halves or self.doubles:
            into.space.give(x)

    def _normed(self, into: Recorder, x: Tensor, h: int, w: int) -> Tensor:
        """The padded input of the first convolution, at the block's output sides."""
        if self.phases or not (self.halves or self.doubles):
            return record_norm(into, self.norm1, x)
        n, _, _, c = x.shape
        normed = into.space.take(*x.shape)
        assert self.norm1 is not None
        into.add(self.norm1.call(x, normed))
        padded = into.space.take_padded(n, h, w, c)
        into.add(_resample_call(normed, inside(padded, h, w), self.halves))
        into.space.give(normed)
        return padded


class Attention:
    """x + out(attention(norm(x)))."""

    def __init__(self, block: AttentionBlock, rewrites: frozenset[str]) -> None:
        self.norm, self.heads = make_norm(block.norm, rewrites, silu=False), block.num_heads
        self.qkv = _linear(block.qkv, 1 if "fused_qkv" in rewrites else 3)
        self.out = _linear(block.out)[0]
        self.own = "native_attention" in rewrites
        self.c_out = self.out.c_out

    def sides(self, h: int, w: int) -> tuple[int, int]:
        return h, w

    def record(self, into: Recorder, x: Tensor, y: Tensor) -> None:
        n, h, w, c = x.shape
        tokens = x
        if self.norm is not None:
            tokens = into.space.take(n, h, w, c)
            into.add(self.norm.call(x, tokens))
        qkv = into.space.take(n, h, w, 3 * c)
        for part, out in zip(self.qkv, qkv.chunk(len(self.qkv), 3), strict=True):
            into.add(part.call(tokens, out))
        attended = tokens if self.norm is not None else into.space.take(n, h, w, c)
        into.add(attention_call(qkv, self.heads, attended, self.own))
        into.add(self.out.call(attended, y, residual=x))
        into.space.give(qkv)
        into.space.give(attended)


class Resample:
    """From one resolution to the next, without an embedding."""

    def __init__(self, module: nn.Module, rewrites: frozenset[str]) -> None:
        self.halves = isinstance(module, (Downsample, nn.AvgPool2d))
        self.phases = isinstance(module, Upsample) and "phase_upsample" in rewrites
        self.conv, self.c_out, self.origin = None, 0, 0
        if isinstance(module, (Downsample, Upsample)):
            self.conv = make_conv(module.conv, rewrites, self.phases)
            self.c_out = self.conv.c_out
            # Padded at the right and the bottom only, the first tap is the first pixel
            self.origin = int(module.conv.padding == (0, 0))

    def sides(self, h: int, w: int) -> tuple[int, int]:
        return _sides(h, w, self.halves, not self.halves)

    def record(self, into: Recorder, x: Tensor, y: Tensor) -> None:
        if self.conv is None:
            into.add(_resample_call(x, y, self.halves))
            return
        n, h, w, c = x.shape
        doubles = not self.halves and not self.phases
        if doubles:
            h, w = 2 * h, 2 * w
        padded = into.space.take_padded(n, h, w, c)
        image = inside(padded, h, w)
        into.add(_resample_call(x, image, False) if doubles else copy_call(x, image))
        first = padded[:, self.origin :, self.origin :]
        into.add(self.conv.call(first, y))
        into.space.give(padded)


Stage = Res | Attention | Resample


def _sides(h: int, w: int, halves: bool, doubles: bool) -> tuple[int, int]:
    if halves:
        return h // 2, w // 2
    return (2 * h, 2 * w) if doubles else (h, w)


def _resample_call(x: Tensor, y: Tensor, halves: bool) -> Call:
    """y = the means of x's 2×2 pixels, or x with each pixel repeated to 2×2."""
    if not halves:
        pixels = y.unfold(1, 2, 2).unfold(2, 2, 2)  # [n, h, w, c, 2, 2]
        return copy_call(x[..., None, None], pixels)

    def run(_: Sequence[Tensor], __: int) -> None:
        y.copy_(F.avg_pool2d(x.movedim(3, 1), 2).movedim(1, 3))

    return run
