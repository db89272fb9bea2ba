"""A UNet's forward pass in PyTorch's and the package's own operations, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .blocks import AttentionBlock, Level, ResBlock
from .torch_layers import Attention, Conv, Image, Norm, Options, Res, Resample, value_of

if TYPE_CHECKING:
    from .unet import UNet


class TorchPlan:
    """The executor of a plan wherever there is no native one.

    It keeps tensors and no module: the UNet's own where they are as needed, else copies.

    Args:
        unet: in eval mode.
        rewrites: names; those in REWRITES mean something here.
        dtype: of x, of the weights and of the output.
    """

    REWRITES: ClassVar[tuple[str, ...]] = (
        "time_table",
        "group_norm_silu",
        "phase_upsample",
        "fused_qkv",
        "channels_last",
    )
    owns_buffers: ClassVar[bool] = False  # any number of threads may call it

    def __init__(self, unet: UNet, rewrites: frozenset[str], dtype: torch.dtype) -> None:
        options = Options(rewrites, dtype, unet.conv_in.weight.device.type == "cuda")
        self._format = options.memory_format
        self._conv_in = Conv(unet.conv_in, options)
        self._down = [_Level(level, options) for level in unet.down]
        middle = (unet.mid_res1, unet.mid_attention, unet.mid_res2)
        self._middle = [part for module in middle for part in _part(module, options)]
        self._up = [_Level(level, options) for level in unet.up]
        self._norm_out, self._conv_out = Norm(unet.norm_out, options), Conv(unet.conv_out, options)

    def __call__(self, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The output [N, out_channels, H, W], contiguous.

        Args:
            x: [N, C, H, W] in the plan's dtype.
            rows: one a residual block, as nn/time_table.py makes them.
        """
        row = iter(rows)
        image: Image = self._conv_in(x.contiguous(memory_format=self._format))
        skips = [image]
        for level in self._down:
            for block in level.blocks:
                for part in block:
                    image = part(image, row)
                skips.append(image)
            for part in level.resample:
                image = part(image, row)
                skips.append(image)
        for part in self._middle:
            image = part(image, row)
        for level in self._up:
            for block in level.blocks:
                image = torch.cat([value_of(image), value_of(skips.pop())], 1)
                for part in block:
                    image = part(image, row)
            for part in level.resample:
                image = part(image, row)
        return self._conv_out(self._norm_out(image)).contiguous()

    def reserve(self, shape: Sequence[int]) -> None:
        """Nothing: it keeps no memory between calls."""


_Part = Res | Attention | Resample


class _Level:
    """A residual block and perhaps attention, several times; then perhaps a change of sides."""

    def __init__(self, level: Level | nn.Module, options: Options) -> None:
        assert isinstance(level, Level)
        self.blocks = [
            [*_part(res, options), *_part(attention, options)]
            for res, attention in zip(level.res, level.attention, strict=True)
        ]
        self.resample = _part(level.resample, options)


def _part(module: nn.Module | None, options: Options) -> list[_Part]:
    if module is None or isinstance(module, nn.Identity):
        return []
    if isinstance(module, ResBlock):
        return [Res(module, options)]
    if isinstance(module, AttentionBlock):
        return [Attention(module, options)]
    return [Resample(module, options)]
