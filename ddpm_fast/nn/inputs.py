"""What a UNet can be given: its checks, which its plan shares."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import UNetConfig


def check_images(config: UNetConfig, x: Tensor) -> None:
    """x is [N, in_channels, H, W], of sides that can be halved as often as there are resolutions.

    Raises:
        ValueError: it is not.
    """
    factor = 2 ** (len(config.channels) - 1)
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x must have shape [N, {config.in_channels}, H, W]; got {list(x.shape)}")
    if x.shape[2] % factor or x.shape[3] % factor or 0 in x.shape[2:]:
        raise ValueError(f"x's sides must be multiples of {factor}; got {list(x.shape)}")


def check_labels(config: UNetConfig, labels: Tensor | None) -> None:
    """Whether class labels may be given, or left out, and lie in their range.

    Raises:
        ValueError: they may not, or do not (on the CPU, where they can be looked at).
    """
    rows = config.embedded_classes
    if rows is None:
        if labels is not None:
            raise ValueError("class_labels given to a UNet without classes (num_classes is None)")
        return
    if labels is None:
        if not config.null_class:
            raise ValueError("class_labels must be given to a UNet that has no null class")
        return
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if lowest < 0 or highest >= rows:
            raise ValueError(f"class_labels must lie in 0 … {rows - 1}; got {lowest} … {highest}")
