"""The parts of a UNet without modules: what nn/torch_plan.py's forward pass is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.group_norm_silu import group_norm_silu
from .blocks import AttentionBlock, Downsample, ResBlock, Upsample

Rows = Iterator[Tensor]


@dataclass(frozen=True)
class Options:
    """How the parts are made.

    Attributes:
        rewrites: their names.
        dtype: of weights and images.
        separate_bias: a convolution adds its bias in a pass of its own, as cuDNN's do, so that it
            is left to an operation that comes next.
    """

    rewrites: frozenset[str]
    dtype: torch.dtype
    separate_bias: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if "channels_last" in self.rewrites else torch.contiguous_format


class Sum:
    """Of two images, not added before there is need: a norm that is first adds them in passing."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.parts: tuple[Tensor, Tensor] | None = (a, b)
        self._value: Tensor | None = None

    def get(self) -> Tensor:
        if self._value is None:
            assert self.parts is not None
            self.set(self.parts[0] + self.parts[1])
        assert self._value is not None
        return self._value

    def set(self, value: Tensor) -> None:
        self._value, self.parts = value, None


Image = Tensor | Sum


def value_of(x: Image) -> Tensor:
    return x.get() if isinstance(x, Sum) else x


class Conv:
    """A convolution."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        assert isinstance(module, nn.Conv2d)
        weight = module.weight.detach().to(options.dtype)
        if "channels_last" in options.rewrites:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = weight
        self.bias = None if module.bias is None else module.bias.detach().to(options.dtype)
        self.stride, self.padding = module.stride, module.padding

    def __call__(self, x: Tensor) -> Tensor:
        return self.with_bias(x, self.bias)

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With another bias [C], or without one."""
        return F.conv2d(x, self.weight, bias, self.stride, self.padding)


class UpsampledConv(Conv):
    """A 3×3 convolution of the image whose every pixel is repeated to 2×2.

    Output pixels of one parity see only 2×2 pixels of the image: (y, x) of it is a 2×2 convolution
    whose weights are sums of the 3×3's, 4 products in place of 9. All four parities are computed as
    one convolution of the padded image, of four times the channels, and then put in their places.
    """

    # Which of a column's three weights fall on each of two neighbouring pixels, by parity.
    _SUMS = (((0,), (1, 2)), ((0, 1), (2,)))

    def __init__(self, module: nn.Module, options: Options) -> None:
        assert isinstance(module, nn.Conv2d)
        super().__init__(module, options)
        self.phases = "phase_upsample" in options.rewrites
        if not self.phases:
            return
        exact = module.weight.detach().double()
        kernels = []
        for rows in self._SUMS:
            for columns in self._SUMS:
                kernel = [[exact[:, :, r][..., c].sum((2, 3)) for c in columns] for r in rows]
                kernels.append(torch.stack([torch.stack(row, -1) for row in kernel], -2))
        weight = torch.cat(kernels).to(options.dtype)
        self.weight = weight.contiguous(memory_format=options.memory_format)
        self.padding = (1, 1)

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.phases:
            return super().with_bias(F.interpolate(x, scale_factor=2.0, mode="nearest"), bias)
        bias = None if bias is None else bias.repeat(4)
        parts = super().with_bias(x, bias)  # [N, 4 C, H + 1, W + 1]
        n, channels, height, width = parts.shape
        last = parts.is_contiguous(memory_format=torch.channels_last)
        y = torch.empty(
            (n, channels // 4, 2 * (height - 1), 2 * (width - 1)),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for phase, part in enumerate(parts.chunk(4, 1)):
            i, j = divmod(phase, 2)
            y[:, :, i::2, j::2] = part[:, :, i : i + height - 1, j : j + width - 1]
        return y


class Norm:
    """A GroupNorm, SiLU after it or not, and what a residual block adds before or applies between;
    nothing where the module is the identity."""

    def __init__(self, module: nn.Module, options: Options, silu: bool = True) -> None:
        self.fused, self.silu = "group_norm_silu" in options.rewrites, silu
        self.there = isinstance(module, nn.GroupNorm)
        if isinstance(module, nn.GroupNorm):
            self.groups, self.eps = module.num_groups, module.eps
            # The operation reads float32 weights beside images of fewer bits
            dtypes = (torch.float32, options.dtype) if self.fused else (options.dtype,)
            dtype = module.weight.dtype if module.weight.dtype in dtypes else options.dtype
            self.weight, self.bias = (p.detach().to(dtype) for p in module.parameters())

    def __call__(
        self,
        image: Image,
        *,
        emb: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        if self.there and self.fused:
            pending = image.parts if isinstance(image, Sum) else None
            x, residual = pending or (value_of(image), None)
            found = group_norm_silu(
                x,
                self.groups,
                self.weight,
                self.bias,
                eps=self.eps,
                emb=emb,
                scale=scale,
                shift=shift,
                residual=residual,
                silu=self.silu,
            )
            if isinstance(found, Tensor):
                return found
            assert isinstance(image, Sum)
            image.set(found[1])
            return found[0]
        x = value_of(image)
        if not self.there:
            return x
        if emb is not None:
            x = x + emb[:, :, None, None]
        x = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x) if self.silu else x


class Res:
    """A residual block."""

    def __init__(self, module: ResBlock, options: Options) -> None:
        self.scale_shift = module.scale_shift
        self.norm1, self.norm2 = Norm(module.norm1, options), Norm(module.norm2, options)
        self.doubles = isinstance(module.resample, nn.Upsample)
        self.halves = isinstance(module.resample, nn.AvgPool2d)
        kind = UpsampledConv if self.doubles else Conv
        self.conv1, self.conv2 = kind(module.conv1, options), Conv(module.conv2, options)
        shortcut = module.shortcut
        self.shortcut = Conv(shortcut, options) if isinstance(shortcut, nn.Conv2d) else None
        self.row_in_norm = options.separate_bias and self.norm2.there and self.norm2.fused

    def __call__(self, image: Image, rows: Rows) -> Image:
        row = next(rows)
        h = self.norm1(image)
        x = value_of(image)
        if self.halves:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.doubles:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.scale_shift:
            scale, shift = row.chunk(2, 1)
            h = self.norm2(self.conv1(h), scale=scale, shift=shift)
        elif row.shape[0] == 1 and not self.row_in_norm:
            h = self.norm2(self.conv1.with_bias(h, row[0]))
        else:
            h = self.norm2(self.conv1.with_bias(h, None), emb=row)
        return Sum(x if self.shortcut is None else self.shortcut(x), self.conv2(h))


class Attention:
    """Self-attention over the pixels."""

    def __init__(self, module: AttentionBlock, options: Options) -> None:
        self.heads, self.norm = module.num_heads, Norm(module.norm, options, silu=False)
        weight, bias = (p.detach().to(options.dtype) for p in module.qkv.parameters())
        self.qkv = [(weight, bias)]
        if "fused_qkv" not in options.rewrites:
            self.qkv = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
        self.out = [p.detach().to(options.dtype) for p in module.out.parameters()]

    def __call__(self, image: Image, rows: Rows) -> Image:
        normed = self.norm(image)
        sides = normed.shape[2:]
        tokens = normed.flatten(2).transpose(1, 2)  # [N, HW, C], a view in channels_last
        parts = [F.linear(tokens, weight, bias) for weight, bias in self.qkv]
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, HW, C/heads]
            for part in (parts if len(parts) == 3 else parts[0].chunk(3, 2))
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return Sum(value_of(image), F.linear(h, *self.out).transpose(1, 2).unflatten(2, sides))


class Resample:
    """From one resolution to the next, without an embedding."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.conv: Conv | None = None
        self.halves = isinstance(module, (Downsample, nn.AvgPool2d))
        if isinstance(module, Downsample):
            self.conv = Conv(module.conv, options)
        elif isinstance(module, Upsample):
            self.conv = UpsampledConv(module.conv, options)

    def __call__(self, image: Image, rows: Rows) -> Image:
        x = value_of(image)
        if self.conv is None:
            return F.avg_pool2d(x, 2) if self.halves else F.interpolate(x, scale_factor=2.0)
        if self.halves and self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)
