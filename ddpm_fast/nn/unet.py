"""The UNet of Ho et al. 2020 (appendix B): residual blocks with the timestep added in, attention at
chosen resolutions, skips from each block of the way down to its counterpart on the way up."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of; the defaults are the CIFAR-10 network of Ho et al. 2020.

    Attributes:
        image_size: side of the square images, in pixels; it fixes at which depth attention lies.
        in_channels, out_channels: of x and of the output; out_channels None means in_channels, and
            2 · in_channels is for learned variances.
        channels: of each resolution, highest first; each halves the side of the one before.
        num_res_blocks: at each resolution on the way down; one more on the way up.
        attention_resolutions: sides at which every residual block is followed by attention. The
            middle always has one.
        num_heads: of each attention.
        dropout: inside the residual blocks, in training.
        num_classes: of class labels, or None. Label ``num_classes`` is the null class.
        label_dropout: in training, the share of labels replaced by the null class.
        norm_groups, norm_eps: of every GroupNorm.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: tuple[int, ...] = (128, 256, 256, 256)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    dropout: float = 0.1
    num_classes: int | None = None
    label_dropout: float = 0.1
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("channels", "attention_resolutions"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "in_channels", "num_res_blocks", "num_heads", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.channels:
            raise ValueError("channels must name at least one resolution")
        if self.image_size % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"image_size must be a multiple of {2 ** (len(self.channels) - 1)}, to be halved "
                f"{len(self.channels) - 1} times; got {self.image_size}"
            )
        for width in self.channels:
            if width % self.norm_groups or width % self.num_heads:
                raise ValueError(
                    f"channels must be multiples of norm_groups ({self.norm_groups}) and num_heads "
                    f"({self.num_heads}); got {width}"
                )
        missing = set(self.attention_resolutions) - set(self.resolutions)
        if missing:
            raise ValueError(
                f"attention_resolutions must be among {list(self.resolutions)}; got "
                f"{sorted(missing)}"
            )
        if self.channels[0] % 2:
            raise ValueError(f"channels must begin with an even number; got {self.channels[0]}")
        if min(self.channels) < 1 or (self.out_channels is not None and self.out_channels < 1):
            raise ValueError(
                f"channels and out_channels must be at least 1; got {self.channels}, "
                f"{self.out_channels}"
            )
        for name in ("dropout", "label_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None; got {self.num_classes}")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The side at each depth."""
        return tuple(self.image_size >> depth for depth in range(len(self.channels)))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[sin(t ω_i), cos(t ω_i)], ω_i = 10000^(−i/(width/2 − 1)), float32 [N, width].

    Vaswani et al. 2017, section 3.5, in the form of Ho et al. 2020's code.
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / max(half - 1, 1)))
    return torch.cat([angles.sin(), angles.cos()], 1)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + linear(SiLU(emb)))))."""

    def __init__(self, c_in: int, c_out: int, emb_width: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb_proj = nn.Linear(emb_width, c_out)
        self.norm2 = _norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """x + out(attention(norm(x))) over the H · W positions."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = _norm(width, config)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = _zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, HW, C/heads]
            for part in self.qkv(tokens).chunk(3, 2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).reshape(n, c, height, width)


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution on one of the two ways; ``resample`` leads to the next."""

    def __init__(
        self,
        widths_in: Sequence[int],
        width: int,
        emb_width: int,
        attends: bool,
        resample: nn.Module | None,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c, width, emb_width, config) for c in widths_in)
        self.attention = nn.ModuleList(
            AttentionBlock(width, config) if attends else nn.Identity() for _ in widths_in
        )
        self.resample = resample

    def down(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            x = attention(res(x, emb))
            skips.append(x)
        if self.resample is not None:
            x = self.resample(x)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for res, attention in zip(self.res, self.attention, strict=True):
            x = attention(res(torch.cat([x, skips.pop()], 1), emb))
        return x if self.resample is None else self.resample(x)


class UNet(nn.Module):
    """ε_θ(x_t, t), or whatever it is trained to predict.

    >>> config = UNetConfig(image_size=8, in_channels=1, channels=(32,), attention_resolutions=())
    >>> model = UNet(config)
    >>> model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, blocks = config.channels, config.num_res_blocks
        emb_width = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_mlp = nn.Sequential(
            nn.Linear(widths[0], emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
        )
        self.class_embedding = (
            None if config.num_classes is None else nn.Embedding(config.num_classes + 1, emb_width)
        )

        last = len(widths) - 1
        self.down = nn.ModuleList()
        skip_widths, c = [widths[0]], widths[0]
        for depth, width in enumerate(widths):
            attends = config.resolutions[depth] in config.attention_resolutions
            resample = None if depth == last else Downsample(width)
            widths_in = [c] + [width] * (blocks - 1)
            self.down.append(Level(widths_in, width, emb_width, attends, resample, config))
            skip_widths += [width] * (blocks + (resample is not None))
            c = width

        self.mid_res1 = ResBlock(c, c, emb_width, config)
        self.mid_attention = AttentionBlock(c, config)
        self.mid_res2 = ResBlock(c, c, emb_width, config)

        self.up = nn.ModuleList()
        for depth, width in reversed(list(enumerate(widths))):
            attends = config.resolutions[depth] in config.attention_resolutions
            up = None if depth == 0 else Upsample(width)
            widths_in = [
                (c if block == 0 else width) + skip_widths.pop() for block in range(blocks + 1)
            ]
            self.up.append(Level(widths_in, width, emb_width, attends, up, config))
            c = width

        self.norm_out = _norm(c, config)
        self.conv_out = _zeroed(
            nn.Conv2d(c, config.out_channels or config.in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's output for a batch.

        Args:
            x: [N, in_channels, S, S], S a multiple of 2^(number of resolutions − 1).
            t: int64 [N].
            class_labels: int64 [N] in 0 … num_classes, the last being the null class; None means
                the null class for all.

        Returns:
            [N, out_channels, S, S] in the parameters' dtype.

        Raises:
            ValueError: a side that cannot be halved so often, labels for a network that has no
                classes, labels out of range (on the CPU, where they can be looked at).
        """
        factor = 2 ** (len(self.config.channels) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"x's sides must be multiples of {factor}; got {list(x.shape)}")
        emb = self.time_mlp(timestep_embedding(t, self.config.channels[0]).to(self.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(self._labels(class_labels, t))
        elif class_labels is not None:
            raise ValueError("class_labels given to a UNet without classes (num_classes is None)")

        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            x = level.down(x, emb, skips)  # type: ignore[operator]
        x = self.mid_res2(self.mid_attention(self.mid_res1(x, emb)), emb)
        for level in self.up:
            x = level.up(x, emb, skips)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(x)))

    def _labels(self, labels: Tensor | None, t: Tensor) -> Tensor:
        null = self.config.num_classes
        assert null is not None
        if labels is None:
            return torch.full_like(t, null)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            lowest, highest = (int(bound) for bound in labels.aminmax())
            if lowest < 0 or highest > null:
                raise ValueError(f"class_labels must lie in 0 … {null}; got {lowest} … {highest}")
        if self.training and self.config.label_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = torch.where(dropped, null, labels)
        return labels

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.conv_in.weight.dtype

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, each whole or not at all."""
        checkpoint.save(directory, self, self.config)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> UNet:
        """The UNet that :meth:`save_pretrained` wrote, on the CPU, in eval mode.

        Raises:
            FileNotFoundError: no such directory or file.
            ValueError: a file that is cut short, of another format or architecture.
        """
        config = checkpoint.load_config(directory, "UNet", UNetConfig)
        model = cls(config)
        checkpoint.load_weights(directory, model, config)
        return model.eval()


def _norm(width: int, config: UNetConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, config.norm_eps)


def _zeroed(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Each residual branch starts as zero (Ho et al. 2020's code)."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module
