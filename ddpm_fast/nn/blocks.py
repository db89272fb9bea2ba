"""The parts of a UNet: residual blocks, attention, and changes of resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig
from .norms import norm_silu


def timestep_embedding(
    t: Tensor, width: int, *, cosine_first: bool = False, freq_shift: int = 1
) -> Tensor:
    """[sin(t ω_i), cos(t ω_i)], ω_i = 10000^(−i/(width/2 − freq_shift)), float32 [N, width].

    Vaswani et al. 2017, section 3.5; by default in the form of Ho et al. 2020's code. [cos, sin]
    and a shift of 0 are that of Nichol & Dhariwal 2021's. In their order of operations and
    diffusers', so that the frequencies have the same bits.
    """
    half = width // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponents / max(half - freq_shift, 1))
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts[::-1] if cosine_first else parts, 1)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + linear(SiLU(emb))))).

    With ``scale_shift`` the linear map gives (a, b), and the second norm is norm(h) · (1 + a) + b.
    ``resample``, without parameters, is applied to x and before the first convolution.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        config: UNetConfig,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm1 = norm(c_in, config)
        self.resample = resample or nn.Identity()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb_proj = nn.Linear(emb_width, (1 + config.scale_shift) * c_out)
        self.norm2 = norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(norm_silu(self.norm1, x)))
        emb = self.emb_proj(F.silu(emb))
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = norm_silu(self.norm2, h, scale=scale, shift=shift)
        else:
            h = norm_silu(self.norm2, h, emb=emb)
        h = self.conv2(self.dropout(h))
        return self.shortcut(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """x + out(attention(norm(x))) over the H · W positions."""

    def __init__(self, width: int, num_heads: int, norm: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm
        self.qkv = nn.Linear(width, 3 * width)
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = norm_silu(self.norm, x, silu=False).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, HW, C/heads]
            for part in self.qkv(tokens).chunk(3, 2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).reshape(n, c, height, width)


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2, padded by 1 on all sides, or with ``padding`` 0 at the right
    and the bottom only."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def downsampler(depth: int, config: UNetConfig) -> nn.Module | None:
    """From the resolution at ``depth`` to the next; None at the last."""
    if depth == len(config.channels) - 1:
        return None
    width, kind = config.channels[depth], config.downsample_at(depth)
    if kind == "conv":
        return Downsample(width, config.downsample_padding)
    pool = nn.AvgPool2d(2)
    return pool if kind == "pool" else ResBlock(width, width, config.embedding_width, config, pool)


def upsampler(depth: int, config: UNetConfig) -> nn.Module | None:
    """From the resolution at ``depth`` to the one before; None at the first."""
    if depth == 0:
        return None
    width, kind = config.channels[depth], config.upsample_at(depth - 1)
    if kind == "conv":
        return Upsample(width)
    double = nn.Upsample(scale_factor=2.0, mode="nearest")
    if kind == "nearest":
        return double
    return ResBlock(width, width, config.embedding_width, config, double)


class Level(nn.Module):
    """The blocks of one resolution on one of the two ways; ``resample`` leads to the next."""

    def __init__(self, widths_in: Sequence[int], depth: int, up: bool, config: UNetConfig) -> None:
        super().__init__()
        width, emb_width = config.channels[depth], config.embedding_width
        attends, heads = config.attends(depth, up), config.heads(width, up)
        # Made first, as its initial weights always were
        resample = upsampler(depth, config) if up else downsampler(depth, config)
        self.res = nn.ModuleList(ResBlock(c, width, emb_width, config) for c in widths_in)
        self.attention = nn.ModuleList(
            AttentionBlock(width, heads, norm(width, config)) if attends else nn.Identity()
            for _ in widths_in
        )
        self.resample = resample

    def down(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            x = attention(res(x, emb))
            skips.append(x)
        if self.resample is not None:
            x = self._resampled(x, emb)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            x = attention(res(torch.cat([x, skips.pop()], 1), emb))
        return x if self.resample is None else self._resampled(x, emb)

    def _resampled(self, x: Tensor, emb: Tensor) -> Tensor:
        assert self.resample is not None
        return self.resample(x, emb) if isinstance(self.resample, ResBlock) else self.resample(x)


def norm(width: int, config: UNetConfig, groups: int | None = None) -> nn.Module:
    """A GroupNorm of the config's groups, or of others; of none, the identity."""
    groups = config.norm_groups if groups is None else groups
    return nn.GroupNorm(groups, width, config.norm_eps) if groups else nn.Identity()


def zeroed(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Each residual branch starts as zero (Ho et al. 2020's code)."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module
