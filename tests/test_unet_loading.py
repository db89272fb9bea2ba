"""What a loaded model has beside its weights, and configs and rates of other kinds of numbers."""

from __future__ import annotations

import json

import numpy as np
import openai_unet
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.nn.blocks import ResBlock
from ddpm_fast.training.checkpoints import (
    CheckpointError,
    Snapshot,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from ddpm_fast.training.config import DataConfig, RunConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = UNetConfig(
    image_size=8, in_channels=1, channels=(8,), num_res_blocks=1, attention_resolutions=(),
    norm_groups=4, dropout=0.0,
)  # fmt: skip
OPENAI = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "num_heads": 2, "channel_mult": "1",
    "attention_resolutions": "8",
}  # fmt: skip


class Scaled(UNet):
    """With a buffer that no checkpoint has, and a number of it that is read when it is made."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.full((1000,), 3.0), persistent=False)
        self.factor = self.scale.sum().item()


def sources(tmp_path, kind):
    """A model's file or object, and what loads it."""
    torch.manual_seed(0)
    if kind == "openai":
        state = openai_unet.create_model(**OPENAI).state_dict()
        return lambda cls: cls.from_openai(state, OPENAI)
    model = UNet(SMALL)
    if kind == "diffusers":
        pytest.importorskip("diffusers")
        theirs = model.to_diffusers()
        return lambda cls: cls.from_diffusers(theirs)
    (model.half() if kind == "half" else model).save_pretrained(tmp_path)
    return lambda cls: cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["ours", "half", "diffusers", "openai"])
def test_a_subclass_is_made_whole(tmp_path, kind):
    load = sources(tmp_path, kind)
    garbage = [torch.full((1000,), torch.nan) for _ in range(50)]  # for memory that nobody fills
    del garbage
    model, plain = load(Scaled), load(UNet)
    assert type(model) is Scaled
    assert not model.training
    assert model.factor == 3000
    assert model.scale.eq(3).all()
    assert model.scale.dtype == (torch.float16 if kind == "half" else torch.float32)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["ours", "openai"])
def test_loading_draws_no_random_numbers(tmp_path, kind):
    load = sources(tmp_path, kind)
    before = torch.get_rng_state()
    load(UNet)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subclass_of_other_weights_is_refused(tmp_path):
    class Wider(UNet):
        def __init__(self, config):
            super().__init__(config)
            self.more = torch.nn.Linear(2, 2)

    UNet(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"more.weight is missing"):
        Wider.from_pretrained(tmp_path)


def run(tmp_path, rates):
    torch.manual_seed(1)
    config = RunConfig(DataConfig("digits"), SMALL, ema_rates=rates)
    weights = UNet(SMALL).state_dict()
    averages = {r: {n: (1 + r) * v for n, v in weights.items()} for r in config.ema_rates}
    return write_checkpoint(tmp_path, Snapshot(config, 1, 2, weights, averages, {})), weights


def test_a_runs_model_is_made_whole(tmp_path, monkeypatch):
    """load_model's too, where a block has a buffer that is not saved."""
    folder, _ = run(tmp_path, (0.9,))
    init = ResBlock.__init__

    def with_buffer(self, *arguments):
        init(self, *arguments)
        self.register_buffer("scale", torch.full((1000,), 3.0), persistent=False)

    monkeypatch.setattr(ResBlock, "__init__", with_buffer)
    assert load_model(folder).model.mid_res1.scale.eq(3).all()


@pytest.mark.parametrize("rates", [(0, 0.99), [np.float64(0.5), np.float32(0.75)]])
def test_rates_of_any_kind_of_number(tmp_path, rates):
    folder, weights = run(tmp_path, rates)
    found = read_checkpoint(folder)
    assert found.config.ema_rates == tuple(rates)
    assert all(type(rate) is float for rate in found.config.ema_rates)
    for rate in rates:
        expected = (1 + float(rate)) * weights["conv_in.weight"]
        assert torch.equal(found.averages[rate]["conv_in.weight"], expected)
        assert torch.equal(load_model(folder, rate).model.conv_in.weight, expected)


def rewritten(folder, change):
    """ema.safetensors under other names, and a state.json that lists it."""
    from ddpm_fast.training.checkpoints import _fingerprint

    path = folder / "ema.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)
    state = json.loads((folder / "state.json").read_text())
    state["files"][path.name] = dict(_fingerprint(path))
    (folder / "state.json").write_text(json.dumps(state))


def test_averages_that_were_written_under_an_integer(tmp_path):
    folder, weights = run(tmp_path, (0.0, 0.99))
    rewritten(folder, lambda name: name.replace("0.0/", "0/", 1))
    assert read_checkpoint(folder).averages[0.0].keys() == weights.keys()
    assert torch.equal(load_model(folder).model.conv_in.weight, weights["conv_in.weight"])


@pytest.mark.parametrize("rate", ["0.98", "nan", "", "x"])
def test_averages_of_no_rate_of_the_config(tmp_path, rate):
    folder, _ = run(tmp_path, (0.99,))
    rewritten(folder, lambda name: name.replace("0.99", rate, 1))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has .*, an average not of"):
        read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(folder)


@pytest.mark.parametrize("rates", [("0.9",), (None,), (0.9, 1j)])
def test_rates_that_are_no_numbers(rates):
    with pytest.raises(TypeError, match="ema_rates must be of numbers"):
        RunConfig(DataConfig("digits"), SMALL, ema_rates=rates)


def test_numpys_numbers_in_a_config(tmp_path):
    config = UNetConfig(
        image_size=np.int64(8), in_channels=np.int32(1), channels=np.array([8, 16]),
        num_res_blocks=np.uint8(1), attention_resolutions=np.array([4]), norm_groups=4,
        dropout=np.float32(0.5), norm_eps=np.float64(1e-5), scale_shift=np.True_,
        cosine_first=np.bool_(False),
    )  # fmt: skip
    assert config.scale_shift is True
    assert config.cosine_first is False
    assert config.channels == (8, 16)
    assert config.dropout == 0.5
    torch.manual_seed(0)
    UNet(config).save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path).config == config
    with pytest.raises(TypeError, match="scale_shift must be True or False"):
        UNetConfig(scale_shift=1)
    with pytest.raises(TypeError, match="num_heads must be of integers"):
        UNetConfig(num_heads=np.True_)
