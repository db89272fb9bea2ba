"""A run that was never trained: a small UNet of random weights in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.training.checkpoints import Snapshot, write_checkpoint
from ddpm_fast.training.config import DataConfig, LossConfig, RunConfig, ScheduleConfig


def write_run(
    folder: Path,
    num_classes: int | None = 10,
    label_dropout: float = 0.1,
    variance: str = "fixed_large",
    spoiled: bool = False,
) -> Path:
    """Its folder. 8×8 grey images, T = 20, step 200; ``spoiled`` weights give NaN."""
    learned = variance in ("learned", "learned_range")
    unet = UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=2 if learned else None,
        channels=(8, 16),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=num_classes,
        norm_groups=4,
    )
    config = RunConfig(
        DataConfig("digits"),
        unet=unet,
        schedule=ScheduleConfig("cosine", 20),
        loss=LossConfig(variance=variance, label_dropout=label_dropout),
        ema_rates=(0.9, 0.99),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = UNet(config.unet).state_dict()
    weights = {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        + (name.endswith("weight") and "norm" in name)
        for name, tensor in tensors.items()
    }
    if spoiled:
        weights["conv_in.bias"] = torch.full_like(weights["conv_in.bias"], torch.nan)
    averages = {
        rate: {name: tensor * rate for name, tensor in weights.items()} for rate in config.ema_rates
    }
    write_checkpoint(folder / "checkpoints", Snapshot(config, 200, 25600, weights, averages, {}))
    return folder
