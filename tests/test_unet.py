"""The UNet: Ho et al.'s architecture, against diffusers' with the same weights, and checkpoints."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.nn.blocks import timestep_embedding

SMALL = UNetConfig(
    image_size=16,
    channels=(32, 64),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_heads=2,
    norm_groups=8,
    dropout=0.0,
)


def randomised(model, seed=0):
    """Weights, norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def test_cifar10_network_has_its_parameters():
    assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == 35_746_307


def diffusers_name(name):
    name = name.replace("time_mlp.0", "time_embedding.linear_1")
    name = name.replace("time_mlp.2", "time_embedding.linear_2")
    name = re.sub(r"^(down|up)\.(\d+)\.res\.(\d+)", r"\1_blocks.\2.resnets.\3", name)
    name = re.sub(r"^(down|up)\.(\d+)\.attention\.(\d+)", r"\1_blocks.\2.attentions.\3", name)
    name = re.sub(r"^(down|up)\.(\d+)\.resample", r"\1_blocks.\2.\1samplers.0", name)
    name = re.sub(r"^mid_res([12])", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = name.replace("mid_attention", "mid_block.attentions.0")
    name = name.replace("emb_proj", "time_emb_proj").replace("shortcut", "conv_shortcut")
    name = name.replace("norm_out", "conv_norm_out")
    if "attentions" in name:
        name = name.replace(".norm.", ".group_norm.").replace(".out.", ".to_out.0.")
    return name


@pytest.mark.parametrize("heads", [1, 2])
def test_is_the_function_that_diffusers_computes(heads):
    diffusers = pytest.importorskip("diffusers")
    config = replace(SMALL, num_heads=heads, channels=(32, 64, 64), image_size=32)
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=64 // heads,
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    theirs = randomised(theirs.eval())
    ours = UNet(config).eval()
    state, filled = theirs.state_dict(), {}
    for name in ours.state_dict():
        other = diffusers_name(name)
        if ".qkv." in other:
            parts = [state.pop(other.replace("qkv", f"to_{part}")) for part in "qkv"]
            filled[name] = torch.cat(parts)
        else:
            filled[name] = state.pop(other)
    assert not state
    ours.load_state_dict(filled)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        found, expected = ours(x, t), theirs(x, t).sample
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 1e-5 * scale
        last = ours.to(memory_format=torch.channels_last)
        again = last(x.to(memory_format=torch.channels_last), t)
    assert (again - expected).abs().max() < 1e-5 * scale


def test_timestep_embedding():
    found = timestep_embedding(torch.tensor([0, 7, 999]), 8).double()
    t = torch.tensor([0.0, 7.0, 999.0]).double()[:, None]
    angles = t * 10000 ** -(torch.arange(4).double() / 3)
    expected = torch.cat([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_starts_as_zero():
    """The last convolution is zero at first, as each residual branch's is."""
    assert not UNet(SMALL)(torch.randn(1, 3, 16, 16), torch.tensor([5])).any()


def test_classes_and_the_null_class():
    model = randomised(UNet(replace(SMALL, num_classes=10, label_dropout=0.5)))
    x, t = torch.randn(64, 3, 16, 16), torch.full((64,), 5)
    labels = torch.arange(64) % 10
    model.eval()
    with torch.no_grad():
        with_label, null = model(x, t, labels), model(x, t, torch.full((64,), 10))
        assert torch.equal(model(x, t), null)
        assert not torch.allclose(with_label, null)
        model.train()
        torch.manual_seed(0)
        trained = model(x, t, labels)
    dropped = (trained - null).abs().amax((1, 2, 3)) < 1e-4
    kept = (trained - with_label).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(dropped, ~kept)
    assert 16 < dropped.sum() < 48  # Binomial(64, ½) leaves 16 … 48 once in 10⁴
    with pytest.raises(ValueError, match="without classes"):
        UNet(SMALL)(x, t, labels)


def test_learned_variances_double_the_channels():
    model = UNet(replace(SMALL, out_channels=6))
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([1, 2])).shape == (2, 6, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    model = randomised(UNet(replace(SMALL, num_classes=3))).to(dtype).eval()
    model.save_pretrained(tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = UNet.from_pretrained(tmp_path / "net")
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == dtype
    model.save_pretrained(tmp_path / "net")  # over itself


@pytest.fixture
def saved(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path)
    return tmp_path


def test_missing_checkpoints(saved):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        UNet.from_pretrained(saved / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        UNet.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        UNet.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_weights_cut_short(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        UNet.from_pretrained(saved)


def test_config_cut_short_or_foreign(saved):
    path = saved / "config.json"
    text = path.read_text()
    for content, message in (
        (text[:40], "not JSON"),
        ("[]", "does not describe a ddpm_fast checkpoint"),
        ("{}", "does not describe a ddpm_fast checkpoint"),
        (text.replace('"UNet"', '"Transformer"'), "describes a Transformer, not a UNet"),
        (text.replace('"format_version": 1', '"format_version": 9'), "format version 9"),
        (text.replace("num_heads", "heads"), "does not configure a UNet"),
        (text.replace('"norm_groups": 8', '"norm_groups": 7'), "does not configure a UNet"),
    ):
        assert content != text
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            UNet.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [32, 128]}, "has shape .*, not"),
        ({"num_res_blocks": 2}, "is missing"),
        ({"num_classes": 4}, "class_embedding.weight is missing"),
        ({"attention_resolutions": []}, "is not of this architecture"),
    ],
)
def test_weights_of_another_architecture(saved, change, message):
    path = saved / "config.json"
    description = json.loads(path.read_text())
    description["config"].update(change)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(saved)


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    """A failure on the way leaves the old files whole and no others."""
    UNet(SMALL).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        randomised(UNet(SMALL)).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        UNet(SMALL).save_pretrained(tmp_path / "file")


def test_an_interrupted_pair_does_not_load(tmp_path, monkeypatch):
    """New weights under an old config would load as another function: it is refused."""
    UNet(SMALL).save_pretrained(tmp_path)
    real, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        UNet(replace(SMALL, num_heads=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="were not saved together"):
        UNet.from_pretrained(tmp_path)


def test_bad_inputs():
    model = UNet(replace(SMALL, num_classes=3))
    x, t = torch.zeros(2, 3, 16, 16), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="class_labels must lie in 0 … 3; got 0 … 4"):
        model(x, t, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="multiples of 2"):
        model(x[..., :15], t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 0}, "at least 1"),
        ({"image_size": 18, "channels": (32, 64, 64)}, "multiple of 4"),
        ({"channels": ()}, "at least one resolution"),
        ({"channels": (32, 60)}, "multiples of norm_groups"),
        ({"attention_resolutions": (5,)}, r"among \[16, 8\]; got \[5\]"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
