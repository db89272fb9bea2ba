"""A small UNet2DModel of diffusers', a small UNet, and what both make of the same images."""

from __future__ import annotations

import torch
from unet_weights import randomised

from ddpm_fast import UNetConfig

T = torch.tensor([0, 1, 437, 999])
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
OURS = UNetConfig(
    image_size=8,
    channels=(8, 16),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    norm_groups=4,
)


def theirs_of(options, seed=0):
    from diffusers import UNet2DModel

    return randomised(UNet2DModel(**options), seed)


def outputs(theirs, ours, dtype=torch.float32, t=T):
    torch.nn.Module.to(theirs, dtype)  # theirs warns of a list of modules that is empty
    ours.to(dtype)
    side = ours.config.image_size
    x = torch.randn(
        len(t), ours.config.in_channels, side, side, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    classes = ours.config.embedded_classes
    labels = () if classes is None else (torch.arange(len(t)) % classes,)
    with torch.no_grad():
        return ours(x, t, *labels), theirs(x, t, *labels).sample
