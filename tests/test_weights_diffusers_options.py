"""Configs of UNet2DModels: the published models', and what has no equivalent said by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from unet2d_models import OURS, SMALL, T, outputs, theirs_of
from unet_weights import gap

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.nn.diffusers_config import config_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

# config.json of google/ddpm-cifar10-32, of their version 0.0.4
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def test_the_cifar10_model_of_ho_et_al():
    options = {name: value for name, value in CIFAR10.items() if not name.startswith("_")}
    theirs = theirs_of(options)
    ours = UNet.from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert config_of(CIFAR10) == ours.config == replace(UNetConfig(), out_channels=3, dropout=0.0)
    assert gap(*outputs(theirs, ours, t=T[1:3])) < 1e-5


def test_the_256_family():
    """google/ddpm-celebahq-256 and its sisters."""
    options = CIFAR10 | {
        "sample_size": 256,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    }
    config = config_of(options)
    assert config.attention_resolutions == (16,)
    with torch.device("meta"):
        ours = UNet(config)
        theirs = diffusers.UNet2DModel(**{k: v for k, v in options.items() if k[0] != "_"})
    assert sum(p.numel() for p in ours.parameters()) == 113_673_219
    assert sum(p.numel() for p in theirs.parameters()) == 113_673_219
    # The same levels, narrow: is 16×16 the side that attends?
    narrow = options | {"block_out_channels": [4, 4, 8, 8, 16, 16], "norm_num_groups": 2}
    narrow = {name: value for name, value in narrow.items() if not name.startswith("_")}
    narrow["sample_size"] = 64  # attention at 4×4
    theirs = theirs_of(narrow)
    assert gap(*outputs(theirs, UNet.from_diffusers(theirs), torch.float64)) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_type": "learned"}, "time_embedding_type='learned'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type='UNetMidBlock2DCrossAttn'"),
        ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor=1.5"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"downsample_type": "fir"}, "downsample_type='fir'"),
        ({"upsample_type": None}, "upsample_type=None"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"class_embed_type": "identity"}, "class_embed_type='identity'"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\]"),
        ({"attention_head_dim": 0}, "attention_head_dim=0 .* for attention of 16 channels"),
        ({"attention_head_dim": 5}, "attention_head_dim=5 .* for attention of 16 channels"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types='SkipDown"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types='CrossAttn"),
        ({"up_block_types": ["UpBlock2D"]}, r"up_block_types=\['UpBlock2D'\]"),
        ({"sample_size": None}, "sample_size=None .* say it by image_size"),
        ({"sample_size": [8, 16]}, r"sample_size=\[8, 16\]"),
        ({"sample_size": 9}, "sample_size=9"),
        ({"cross_attention_dim": 64}, "cross_attention_dim=64 is unknown"),
        ({"freq_shift": 7}, "freq_shift must lie in"),
        ({"block_out_channels": [9, 16]}, "channels must be multiples of norm_groups"),
    ],
)
def test_options_without_an_equivalent(change, message):
    with pytest.raises(ValueError, match=message):
        config_of(SMALL | change)


def test_options_that_mean_the_same():
    config = config_of(SMALL)
    assert config_of(SMALL | {"act_fn": "swish", "center_input_sample": None}) == config
    assert config_of(SMALL | {"sample_size": [8, 8], "_name_or_path": "x", "new": None}) == config
    old = {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    assert config_of(SMALL | old) == config
    assert config_of(SMALL | {"sample_size": None}, image_size=16).resolutions == (16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": ("pool",)}, "downsample='pool'"),
        ({"upsample": ("nearest",)}, "upsample='nearest'"),
        ({"time_channels": 16}, "time_channels=16"),
        ({"attention_resolutions": (8, 4)}, r"num_heads=2 .*head_channels would be \[4, 8\]"),
        ({"num_heads_up": 4}, "num_heads=2 for attention"),
        ({"middle_norm_groups": 0}, "middle_norm_groups=0 without scale_shift"),
        (
            {
                "channels": (8, 16, 16),
                "attention_resolutions": (8, 4),
                "num_heads": 1,
                "downsample": ("conv", "resblock"),
            },
            r"downsample=\['conv', 'resblock'\] where there is attention",
        ),
    ],
)
def test_what_diffusers_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(replace(OURS, **change)).to_diffusers()
