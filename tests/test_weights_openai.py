"""UNets from OpenAI's improved- and guided-diffusion: the same function from the same weights."""

from __future__ import annotations

import os

import openai_unet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unet_weights import assert_same_function, assert_same_weights, gap, randomised

from ddpm_fast import UNet
from ddpm_fast.nn.openai_weights import config_of

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor([0.0, 1.0, 437.25, 999.0])  # rescaled timesteps are no integers
SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
}


def theirs_of(options, seed=0):
    return randomised(openai_unet.create_model(**options), seed)


def outputs(theirs, ours, dtype=torch.float32):
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    side = ours.config.image_size
    x = torch.randn(len(T), 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels = None if ours.config.num_classes is None else torch.tensor([0, 3, 999, 5])
    with torch.no_grad():
        return ours(x, T, labels), theirs(x, T, labels)


@st.composite
def scripts_options(draw):
    """Options of the scripts, of small networks."""
    one_of = st.sampled_from
    return {
        "image_size": draw(one_of([8, 16])),
        "num_channels": 32,
        "num_res_blocks": draw(st.integers(1, 2)),
        "num_heads": draw(one_of([1, 2, 4])),
        "num_heads_upsample": draw(one_of([-1, 1, 4])),
        "num_head_channels": draw(one_of([-1, -1, 8, 32])),
        "attention_resolutions": draw(one_of(["4", "8,4", "16,2", "64"])),
        "channel_mult": draw(one_of(["1,2", "2,1", "1,1,3", "1"])),
        "dropout": draw(one_of([0.0, 0.1])),
        "learn_sigma": draw(st.booleans()),
        "class_cond": draw(st.booleans()),
        "use_scale_shift_norm": draw(st.booleans()),
        "resblock_updown": draw(st.booleans()),
        "use_new_attention_order": draw(st.booleans()),
    }


@settings(max_examples=20, deadline=None, derandomize=True)
@given(options=scripts_options(), seed=st.integers(0, 99))
def test_any_model(options, seed):
    theirs = theirs_of(options, seed)
    ours = UNet.from_openai(theirs.state_dict(), options)
    assert not ours.training
    assert_same_function(outputs(theirs, ours), outputs(theirs, ours, torch.float64))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(options=scripts_options(), seed=st.integers(0, 99))
def test_many_models(options, seed):
    theirs = theirs_of(options, seed)
    ours = UNet.from_openai(theirs.state_dict(), options)
    assert_same_function(outputs(theirs, ours), outputs(theirs, ours, torch.float64))


@pytest.mark.parametrize("legacy", [False, True])
def test_the_order_of_attention_matters(legacy):
    """With two heads or more; or else the tests above would not see it."""
    options = SMALL | {"use_new_attention_order": not legacy}
    theirs = theirs_of(options)
    other = options | {"use_new_attention_order": legacy}
    assert gap(*outputs(theirs, UNet.from_openai(theirs.state_dict(), other))) > 0.01


def test_resampling_without_convolutions():
    theirs = openai_unet.UNetModel(
        8, 1, 32, 2, 1, (2,), channel_mult=(1, 2), conv_resample=False, num_classes=7
    )
    theirs = randomised(theirs)
    options = SMALL | {"conv_resample": False, "in_channels": 1, "num_heads": 1}
    options |= {"use_scale_shift_norm": False, "learn_sigma": True}
    options |= {"class_cond": True, "num_classes": 7}
    ours = UNet.from_openai(theirs.state_dict(), options)
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 6, 3, 3])
    with torch.no_grad():
        assert gap(ours.double()(x, T, y), theirs.double()(x, T, y)) < 1e-13


def test_a_narrow_first_level():
    """guided-diffusion at 512: the timestep's embedding has twice the channels of the first."""
    theirs = openai_unet.UNetModel(8, 3, 64, 3, 1, (2,), channel_mult=(0.5, 1))
    options = SMALL | {"num_channels": 64, "channel_mult": [0.5, 1], "num_heads": 1}
    options |= {"use_scale_shift_norm": False}
    theirs = randomised(theirs)
    ours = UNet.from_openai(theirs.state_dict(), options)
    assert (ours.config.channels, ours.config.time_channels) == ((32, 64), 64)
    assert gap(*outputs(theirs, ours, torch.float64)) < 1e-13


IMPROVED_CIFAR10 = {
    "image_size": 32,
    "num_channels": 128,
    "num_res_blocks": 3,
    "learn_sigma": True,
    "dropout": 0.3,
}
GUIDED_64 = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "image_size": 64,
    "learn_sigma": True,
    "num_channels": 192,
    "num_head_channels": 64,
    "num_res_blocks": 3,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "use_scale_shift_norm": True,
    "dropout": 0.1,
    # what a flag file says beside
    "diffusion_steps": 1000,
    "noise_schedule": "cosine",
    "use_fp16": True,
}
GUIDED_256 = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "image_size": 256,
    "learn_sigma": True,
    "num_channels": 256,
    "num_head_channels": 64,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
GUIDED_128 = GUIDED_256 | {"image_size": 128, "num_head_channels": -1, "num_heads": 4}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (IMPROVED_CIFAR10, 52_546_438),
        (GUIDED_64, 295_904_454),
        (GUIDED_128, 421_529_606),
        (GUIDED_256, 553_838_086),
        (GUIDED_256 | {"class_cond": False}, 552_814_086),
        (GUIDED_256 | {"image_size": 512}, 558_997_638),
    ],
)
def test_the_published_models(options, parameters):
    """As many parameters as in OpenAI's code; Dhariwal & Nichol 2021 give 296, 422, 554 and 559
    million for the conditional ones."""
    others = ("use_fp16", "diffusion_steps", "noise_schedule")
    known = {name: value for name, value in options.items() if name not in others}
    with torch.device("meta"):
        ours, theirs = UNet(config_of(options)), openai_unet.create_model(**known)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in theirs.parameters()) == parameters


def test_files(tmp_path):
    theirs = theirs_of(SMALL)
    path = tmp_path / "ema_0.9999_500000.pt"
    torch.save(theirs.state_dict(), path)
    expected = UNet.from_openai(theirs.state_dict(), SMALL)
    for source in (path, str(path)):
        assert_same_weights(UNet.from_openai(source, SMALL), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    tensors = theirs_of(SMALL).to(dtype).state_dict()
    ours = UNet.from_openai(tensors, SMALL)
    assert ours.dtype == dtype
    assert torch.equal(ours.conv_in.weight, tensors["input_blocks.0.0.weight"])
    # convert_to_fp16 leaves the first and the last layers in float32
    mixed = tensors | {"out.2.weight": tensors["out.2.weight"].float()}
    assert UNet.from_openai(mixed, SMALL).dtype == torch.float32


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_none(tmp_path):
    tensors = theirs_of(SMALL).state_dict()
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"model.pt"):
        UNet.from_openai(path, SMALL)
    torch.save(tensors | {"evil": Evil(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"no whole file of tensors: .* run code"):
        UNet.from_openai(path, SMALL)
    assert not (tmp_path / "ran").exists()
    torch.save(tensors, path)
    whole = path.read_bytes()
    for keep in (0, 20, 5000, len(whole) - 5):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"model.pt is no"):
            UNet.from_openai(path, SMALL)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model.pt holds no state dict, but list"):
        UNet.from_openai(path, SMALL)
    torch.save(tensors | {"step": 3}, path)
    with pytest.raises(ValueError, match="is no state dict of a model: 'step' is of type int"):
        UNet.from_openai(path, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_res_blocks": 2}, r"\S+ is missing"),
        ({"attention_resolutions": "64"}, r"input_blocks.3.1.\S+ is not of this architecture"),
        ({"class_cond": True}, "label_emb.weight is missing"),
        ({"learn_sigma": True}, r"out.2.weight has shape \[3, 32, 3, 3\], not \[6, 32, 3, 3\]"),
        ({"use_scale_shift_norm": False}, r"emb_layers.1.weight has shape \[64, 128\], not \[32"),
        ({"channel_mult": "1,4"}, r"has shape"),
        ({"resblock_updown": True}, r"input_blocks.2.0.in_layers.0.weight is missing"),
    ],
)
def test_weights_of_another_architecture(change, message):
    with pytest.raises(ValueError, match=f"the state dict does not fit its config: .*{message}"):
        UNet.from_openai(theirs_of(SMALL).state_dict(), SMALL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"large_size": 256}, "option large_size=256 is unknown or has no equivalent"),
        ({"classifier_depth": 2}, "option classifier_depth=2 is unknown"),
        ({"dims": 3}, "option dims=3 is unknown"),
        ({"image_size": 48, "channel_mult": ""}, "image_size 48 has no default of it"),
        ({"channel_mult": "1,two"}, "channel_mult='1,two' cannot be used: it must be numbers"),
        ({"attention_resolutions": "16;8"}, "attention_resolutions='16;8' cannot be used"),
        ({"attention_resolutions": [0]}, r"attention_resolutions=\[0\] cannot be used"),
        ({"num_channels": "64"}, "num_channels='64' cannot be used: it must be an integer"),
        ({"image_size": 8.0}, "image_size=8.0 cannot be used: it must be an integer"),
        ({"dropout": True}, "dropout=True cannot be used: it must be a number"),
        ({"attention_resolutions": 16}, "attention_resolutions=16 cannot be used"),
        ({"learn_sigma": 1}, "learn_sigma=1 cannot be used: it must be true or false"),
        ({"num_channels": 48}, "no equivalent in a UNet: channels must be multiples"),
        ({"num_head_channels": 24}, "no equivalent in a UNet: head_channels must divide"),
        ({"num_heads_upsample": 3}, "no equivalent in a UNet: num_heads_up must divide"),
    ],
)
def test_options_that_cannot_be_used(change, message):
    with pytest.raises(ValueError, match=message):
        config_of(SMALL | change)


def test_options_in_lists():
    expected = config_of(SMALL)
    assert config_of(SMALL | {"channel_mult": [1, 2], "attention_resolutions": [4]}) == expected
    assert config_of({"image_size": 32, "channel_mult": ""}).channels == (128, 256, 256, 256)


def test_guided_models_as_diffusers():
    """What came from OpenAI goes on to diffusers where that can be it."""
    pytest.importorskip("diffusers")
    options = SMALL | {"resblock_updown": True, "num_head_channels": 16, "class_cond": True}
    theirs = theirs_of(options)
    ours = UNet.from_openai(theirs.state_dict(), options)
    exported = ours.to_diffusers().double()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 999, 5])
    with torch.no_grad():
        assert gap(exported(x, T, y).sample, theirs.double()(x, T, y)) < 1e-13
