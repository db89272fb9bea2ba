"""UNets from and to diffusers' UNet2DModel: the same function, the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unet2d_models import OURS, SMALL, outputs, theirs_of
from unet_weights import assert_same_function, assert_same_weights, gap, randomised

from ddpm_fast import UNet
from ddpm_fast.nn.diffusers_config import config_of, options_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


@pytest.fixture
def small():
    return theirs_of(SMALL)


@st.composite
def unet2d_options(draw):
    """Options of a UNet2DModel, as any of them may be."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([2, 4]))
    one_of = st.sampled_from
    return {
        "sample_size": draw(one_of([2, 4])) << (levels - 1),
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 4)),
        "time_embedding_dim": draw(one_of([None, 10])),
        "freq_shift": draw(one_of([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        "down_block_types": tuple(draw(one_of(DOWN)) for _ in range(levels)),
        "up_block_types": tuple(draw(one_of(UP)) for _ in range(levels)),
        "mid_block_type": draw(one_of(["UNetMidBlock2D", "UNetMidBlock2D", None])),
        "block_out_channels": tuple(draw(one_of([4, 8, 12])) for _ in range(levels)),
        "layers_per_block": draw(st.integers(1, 2)),
        "downsample_padding": draw(one_of([0, 1])),
        "downsample_type": draw(one_of(["conv", "resnet"])),
        "upsample_type": draw(one_of(["conv", "resnet"])),
        "dropout": draw(one_of([0.0, 0.1])),
        "attention_head_dim": draw(one_of([None, 1, 2, 4])),
        "norm_num_groups": groups,
        "attn_norm_num_groups": draw(one_of([None, 1, 2])),
        "norm_eps": draw(one_of([1e-6, 1e-5, 0.1])),
        "resnet_time_scale_shift": draw(one_of(["default", "scale_shift"])),
        "add_attention": draw(one_of([True, True, False])),
        "num_class_embeds": draw(one_of([None, 3])),
    }


def check_there_and_back(options, seed):
    theirs = theirs_of(options, seed)
    ours = UNet.from_diffusers(theirs)
    assert not ours.training
    assert config_of(options_of(ours.config)) == ours.config
    back = ours.to_diffusers()
    assert_same_weights(back, theirs)
    assert_same_weights(UNet.from_diffusers(back), ours)
    assert_same_function(outputs(theirs, ours), outputs(theirs, ours, torch.float64))
    assert gap(*outputs(back, ours, torch.float64)) < 1e-12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(options=unet2d_options(), seed=st.integers(0, 99))
def test_any_model_there_and_back(options, seed):
    check_there_and_back(options, seed)


@pytest.mark.parametrize(
    "change",
    [
        {"resnet_time_scale_shift": "scale_shift"},  # their middle attention has no norm then
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
        {"attn_norm_num_groups": 2},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"num_class_embeds": 3, "time_embedding_dim": 10, "norm_eps": 0.1},
    ],
)
def test_some_models_there_and_back(change):
    check_there_and_back(SMALL | change, 0)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(options=unet2d_options(), seed=st.integers(0, 99))
def test_many_models_there_and_back(options, seed):
    check_there_and_back(options, seed)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_heads": 4, "channels": (8, 16, 16), "attention_up_resolutions": ()},
        {"num_heads": 1, "attention_resolutions": (8, 4)},
        {"num_classes": 5},
        {"num_classes": 5, "null_class": False},
        {"middle": "none"},
        {"middle": "residual", "scale_shift": True},
        {"scale_shift": True, "middle_norm_groups": 0},
        {"scale_shift": True, "downsample": ("resblock",), "upsample": ("resblock",)},
        {"out_channels": 6, "embedding_channels": 20, "freq_shift": 0, "cosine_first": True},
    ],
)
def test_ours_there_and_back(change):
    ours = randomised(UNet(replace(OURS, **change)))
    theirs = ours.to_diffusers()
    null = ours.config.num_classes is not None and ours.config.null_class
    again = UNet.from_diffusers(theirs, null_class=null)
    assert_same_weights(again, ours)
    assert (again.config.num_classes, again.config.null_class) == (
        ours.config.num_classes,
        ours.config.null_class,
    )
    assert_same_function(outputs(theirs, ours), outputs(theirs, ours, torch.float64))
    assert gap(*outputs(theirs, again, torch.float64)) < 1e-12


def test_to_diffusers_keeps_the_mode_and_shares_nothing():
    ours = randomised(UNet(OURS))
    assert not ours.to_diffusers().training
    theirs = ours.train().to_diffusers()
    assert theirs.training
    with torch.no_grad():
        theirs.conv_in.weight.zero_()
    assert ours.conv_in.weight.any()
    again = UNet.from_diffusers(theirs)
    theirs.conv_in.weight.data.fill_(1.0)
    assert not again.conv_in.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path, small, dtype):
    torch.nn.Module.to(small, dtype)
    small.save_pretrained(tmp_path)
    for source in (small, tmp_path):
        ours = UNet.from_diffusers(source)
        assert ours.dtype == dtype
        assert_same_weights(ours.to_diffusers(), small)
