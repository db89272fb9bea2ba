"""State dicts that are wrapped: names that all begin alike, other things beside them in a file."""

from __future__ import annotations

import openai_unet
import pytest
import torch
from unet2d_models import SMALL, theirs_of
from unet_weights import assert_same_weights, randomised

from ddpm_fast import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

OPENAI = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
}


class FromOpenAI:
    """What is made of a state dict's tensors, and the one that is expected."""

    def __init__(self, folder):
        self.folder = folder
        self.tensors = randomised(openai_unet.create_model(**OPENAI)).state_dict()
        self.expected = self.load(self.tensors)

    def load(self, content):
        path = self.folder / "model.pt"
        torch.save(content, path)
        return UNet.from_openai(path, OPENAI)


class FromDiffusers(FromOpenAI):
    def __init__(self, folder):
        pytest.importorskip("diffusers")
        self.folder = folder
        theirs = theirs_of(SMALL)
        theirs.save_config(folder)
        self.tensors = theirs.state_dict()
        self.expected = UNet.from_diffusers(theirs)

    def load(self, content):
        torch.save(content, self.folder / "diffusion_pytorch_model.bin")
        return UNet.from_diffusers(self.folder)


@pytest.fixture(params=[FromOpenAI, FromDiffusers])
def source(request, tmp_path):
    return request.param(tmp_path)


def named(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def test_names_of_ddp(source):
    assert_same_weights(source.load(named("module.", source.tensors)), source.expected)


def test_names_of_ddp_in_memory():
    tensors = randomised(openai_unet.create_model(**OPENAI)).state_dict()
    found = UNet.from_openai(named("module.", tensors), OPENAI)
    assert_same_weights(found, UNet.from_openai(tensors, OPENAI))


def test_names_of_ddp_in_safetensors(tmp_path):
    pytest.importorskip("diffusers")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = theirs_of(SMALL)
    theirs.save_config(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.save_file(named("module.", theirs.state_dict()), path)
    assert_same_weights(UNet.from_diffusers(tmp_path), UNet.from_diffusers(theirs))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.unet.", "module.module.", "unet-"])
def test_other_names_that_begin_alike(source, prefix):
    shown = "module." if prefix == "module.module." else prefix
    with pytest.raises(ValueError, match=f"all its names begin with '{shown}'.* without it"):
        source.load(named(prefix, source.tensors))


def test_names_that_do_not_all_begin_alike(source):
    first, *rest = source.tensors
    mixed = {first: source.tensors[first]}
    mixed |= named("module.", {name: source.tensors[name] for name in rest})
    with pytest.raises(ValueError, match=r"is missing; .* and \d+ more$"):
        source.load(mixed)
    with pytest.raises(ValueError, match=r"is missing; .* and \d+ more$"):
        source.load(named("x.", {"": source.tensors[first]}))  # of another model altogether


@pytest.mark.parametrize("beside", [{}, {"step": 3, "rates": [0.9, {"a": 1}], "name": "x"}])
def test_a_state_dict_within(source, beside):
    assert_same_weights(source.load({"state_dict": source.tensors, **beside}), source.expected)
    wrapped = {**beside, "state_dict": named("module.", source.tensors)}
    assert_same_weights(source.load(wrapped), source.expected)


@pytest.mark.parametrize(
    "beside", [{"ema": {"a": torch.ones(2)}}, {"optimizer": {"state": [{"m": torch.ones(2)}]}}]
)
def test_a_state_dict_beside_other_tensors(source, beside):
    (name,) = beside
    with pytest.raises(ValueError, match=f"tensors in 'state_dict' and in '{name}': give the one"):
        source.load({"step": 3, "state_dict": source.tensors, **beside})


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_state_dict_under_another_name(source, name):
    with pytest.raises(ValueError, match=f"has its tensors in '{name}': give that alone"):
        source.load({name: source.tensors})


@pytest.mark.parametrize(
    "content", [{"state_dict": 3}, {"state_dict": {"a": 1}}, {"a": 1}, {3: torch.ones(2)}]
)
def test_no_state_dict_within(source, content):
    with pytest.raises(
        ValueError, match=r"is no state dict of a model: (3|'state_dict'|'a') is of"
    ):
        source.load(content)
    within = {"state_dict": {"a": torch.ones(2), "b": 1}}
    with pytest.raises(ValueError, match="is no state dict of a model: 'b' is of type int"):
        source.load(within)
