"""The UNet of Ho et al. 2020 (appendix B): residual blocks with the timestep added in, attention at
chosen resolutions, skips from each block of the way down to its counterpart on the way up. Its
config also describes the variants of Nichol & Dhariwal 2021, Dhariwal & Nichol 2021 and diffusers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .blocks import AttentionBlock, Level, ResBlock, norm, timestep_embedding, zeroed
from .config import UNetConfig
from .inputs import check_images, check_labels
from .norms import norm_silu

__all__ = ["UNet", "UNetConfig"]


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
        emb_width, classes = config.embedding_width, config.embedded_classes
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_mlp = nn.Sequential(
            nn.Linear(config.time_width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
        )
        self.class_embedding = None if classes is None else nn.Embedding(classes, emb_width)

        self.down = nn.ModuleList()
        skip_widths, c = [widths[0]], widths[0]
        for depth, width in enumerate(widths):
            level = Level([c] + [width] * (blocks - 1), depth, False, config)
            self.down.append(level)
            skip_widths += [width] * (blocks + (level.resample is not None))
            c = width

        attention: nn.Module = nn.Identity()
        middle = config.middle != "none"
        self.mid_res1 = ResBlock(c, c, emb_width, config) if middle else None
        if config.middle == "attention":
            middle_norm = norm(c, config, config.middle_norm_groups)
            attention = AttentionBlock(c, config.heads(c, False), middle_norm)
        self.mid_attention = attention
        self.mid_res2 = ResBlock(c, c, emb_width, config) if middle else None

        self.up = nn.ModuleList()
        for depth, width in reversed(list(enumerate(widths))):
            widths_in = [
                (c if block == 0 else width) + skip_widths.pop() for block in range(blocks + 1)
            ]
            self.up.append(Level(widths_in, depth, True, config))
            c = width

        self.norm_out = norm(c, config)
        self.conv_out = zeroed(
            nn.Conv2d(c, config.out_channels or config.in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's output for a batch.

        Args:
            x: [N, in_channels, S, S], S a multiple of 2^(number of resolutions − 1).
            t: [N], int64 or float.
            class_labels: int64 [N] in 0 … num_classes, the last being the null class; None means
                the null class for all. Without a null class, 0 … num_classes − 1 and no None.

        Returns:
            [N, out_channels, S, S] in the parameters' dtype.

        Raises:
            ValueError: an x of another shape, labels for a network that has no classes, none for
                one that needs them, labels out of range (on the CPU, where they can be looked at).
        """
        config = self.config
        check_images(config, x)
        check_labels(config, class_labels)
        embedded = timestep_embedding(
            t, config.time_width, cosine_first=config.cosine_first, freq_shift=config.freq_shift
        )
        emb = self.time_mlp(embedded.to(self.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(self._labels(class_labels, t))

        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            x = level.down(x, emb, skips)  # type: ignore[operator]
        if self.mid_res1 is not None and self.mid_res2 is not None:
            x = self.mid_res2(self.mid_attention(self.mid_res1(x, emb)), emb)
        for level in self.up:
            x = level.up(x, emb, skips)  # type: ignore[operator]
        return self.conv_out(norm_silu(self.norm_out, x))

    def _labels(self, labels: Tensor | None, t: Tensor) -> Tensor:
        classes = self.config.num_classes
        assert classes is not None
        if labels is None:
            return torch.full(t.shape, classes, dtype=torch.int64, device=t.device)
        if self.training and self.config.null_class and self.config.label_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = torch.where(dropped, classes, labels)
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
        shapes = checkpoint.skeleton(UNet, config, directory)
        tensors = checkpoint.load_weights(directory, shapes)
        return checkpoint.build(cls, config, tensors, directory).eval()

    @classmethod
    def from_diffusers(
        cls,
        source: Any,
        *,
        image_size: int | None = None,
        null_class: bool = False,
        variant: str | None = None,
    ) -> UNet:
        """The same function as a UNet2DModel of diffusers', with a copy of its weights.

        Args:
            source: a UNet2DModel, compiled or not, a pipeline that has one as its ``unet``, or the
                directory that either was saved in. diffusers need not be installed to read a
                directory; a legacy .bin file is read by ``torch.load(weights_only=True)``.
            image_size: side of the images; the config's sample_size if None.
            null_class: the last class is the null class, which diffusers' config cannot say.
            variant: of a directory's files, as diffusers names it: "fp16" reads
                diffusion_pytorch_model.fp16.safetensors.

        Returns:
            A UNet in eval mode, of the same dtype, on the model's device or the CPU.

        Raises:
            FileNotFoundError: no such directory or file.
            TypeError: an object of another class.
            ValueError: an option that this UNet has no equivalent of, by name; a file that is cut
                short; tensors that are missing, unknown or of another shape; weights that are
                offloaded.

        >>> model = UNet(UNetConfig(image_size=8, channels=(32,), attention_resolutions=(8,)))
        >>> again = UNet.from_diffusers(model.to_diffusers())
        >>> torch.equal(again.mid_attention.qkv.weight, model.mid_attention.qkv.weight)
        True
        """
        from . import diffusers_weights

        return diffusers_weights.load(cls, source, image_size, null_class, variant)

    def to_diffusers(self) -> Any:
        """The same function as a UNet2DModel of diffusers', with a copy of the weights.

        It has this module's dtype, device and mode; a null class is its last one. Its
        ``save_pretrained`` writes a directory that diffusers loads.

        Raises:
            ImportError: diffusers is not installed.
            ValueError: an option that a UNet2DModel has no equivalent of, by name.
        """
        from . import diffusers_weights

        return diffusers_weights.export(self)

    @classmethod
    def from_openai(
        cls,
        source: Mapping[str, Tensor] | str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
    ) -> UNet:
        """The same function as a UNetModel of improved- or guided-diffusion, with its weights.

        Args:
            source: its state dict, or the path of one in a .pt file, which is read by
                ``torch.load(weights_only=True)``, or in a .safetensors file. The names may be those
                of DistributedDataParallel.
            config: the options of their scripts by name, as in ``dict(image_size=64,
                num_channels=192, learn_sigma=True, …)``; those left out have the scripts' defaults,
                and those of the diffusion process are passed over. Also ``in_channels``,
                ``num_classes`` (1000 with class_cond) and ``conv_resample``.

        Returns:
            A UNet in eval mode on the CPU; in float32 where the tensors' dtypes differ.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an option that is unknown or has no equivalent, by name; a file that holds
                other things than tensors; tensors that are missing, unknown or of another shape.
        """
        from . import openai_weights

        return openai_weights.load(cls, source, config or {})
