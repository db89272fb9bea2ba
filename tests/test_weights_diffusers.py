"""UNets from and to diffusers' UNet2DModel: the same function, the same weights, and what it is not
there for said by name."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unet_weights import assert_same_function, assert_same_weights, gap, randomised

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.nn.diffusers_config import config_of, options_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor([0, 1, 437, 999])
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
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
    return randomised(diffusers.UNet2DModel(**options), seed)


@pytest.fixture
def small():
    return theirs_of(SMALL)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path, small, dtype):
    torch.nn.Module.to(small, dtype)
    small.save_pretrained(tmp_path)
    for source in (small, tmp_path):
        ours = UNet.from_diffusers(source)
        assert ours.dtype == dtype
        assert_same_weights(ours.to_diffusers(), small)


def test_a_directory_without_diffusers(tmp_path, small, monkeypatch):
    expected = UNet.from_diffusers(small)
    small.save_pretrained(tmp_path / "model")
    pipeline = diffusers.DDPMPipeline(small, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("model", "pipeline", "shards"):
        found = UNet.from_diffusers(tmp_path / name)
        assert found.config == expected.config
        assert_same_weights(found, expected)
    assert_same_weights(UNet.from_diffusers(str(tmp_path / "pipeline" / "unet")), expected)
    with pytest.raises(ImportError, match=r"pip install 'ddpm_fast\[diffusers\]'"):
        expected.to_diffusers()


def to_bin(folder, tensors):
    (folder / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")


def test_files_of_old_versions(tmp_path, small):
    small.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = small.state_dict()
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert tensors.keys() != small.state_dict().keys()
    to_bin(tmp_path, tensors)
    assert_same_weights(UNet.from_diffusers(tmp_path), UNet.from_diffusers(small))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_is_run(tmp_path, small):
    folder = tmp_path / "model"
    small.save_pretrained(folder)
    to_bin(folder, small.state_dict() | {"evil": Evil(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"_model.bin is no whole file of tensors: .* run code"):
        UNet.from_diffusers(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_files_cut_short(tmp_path, small, keep):
    small.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        UNet.from_diffusers(tmp_path)
    to_bin(tmp_path, small.state_dict())
    path = tmp_path / "diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"\.bin is n"):
        UNet.from_diffusers(tmp_path)


def test_what_is_missing(tmp_path, small):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        UNet.from_diffusers(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file: it is a file"):
        UNet.from_diffusers(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        UNet.from_diffusers(tmp_path)
    small.save_pretrained(tmp_path / "a", variant="fp16")
    with pytest.raises(
        FileNotFoundError, match=r"is missing; there is diffusion_pytorch_model.fp16.safetensors"
    ):
        UNet.from_diffusers(tmp_path / "a")
    small.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    next((tmp_path / "b").glob("*00002-of*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-\d+.safetensors is missing"):
        UNet.from_diffusers(tmp_path / "b")
    with pytest.raises(TypeError, match="a UNet2DModel or a directory; got Linear"):
        UNet.from_diffusers(torch.nn.Linear(2, 2))


def test_directories_of_another_kind(tmp_path, small):
    UNet(OURS).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"a ddpm_fast checkpoint: UNet.from_pretrained reads it"):
        UNet.from_diffusers(tmp_path / "ours")
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for content, message in (
        (json.dumps(config | {"_class_name": "VQModel"}), "describes VQModel, not a UNet2DModel"),
        ("[]", "describes None, not a UNet2DModel"),
        (path.read_text()[:50], "is not JSON"),
        (json.dumps(config | {"block_out_channels": 8}), "config cannot be read: 'int' object is"),
        (json.dumps(config | {"dropout": None}), "config cannot be read: "),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            UNet.from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_block": 2}, r"down_blocks.0.resnets.1.norm1.weight is missing"),
        ({"add_attention": False}, r"mid_block.attentions.0.\S+ is not of this architecture"),
        ({"block_out_channels": [8, 24]}, r"has shape \[\d+.*\], not \[\d+"),
        ({"in_channels": 1}, r"conv_in.weight has shape \[8, 3, 3, 3\], not \[8, 1, 3, 3\]"),
        ({"num_class_embeds": 3}, r"class_embedding.weight is missing"),
        ({"resnet_time_scale_shift": "scale_shift"}, r"time_emb_proj.weight has shape \[8, 32\]"),
    ],
)
def test_weights_of_another_architecture(tmp_path, small, change, message):
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_diffusers(tmp_path)
    assert "diffusion_pytorch_model.safetensors does not fit its config" in str(caught.value)


def test_the_global_generator_is_left_alone(small):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    UNet.from_diffusers(small)
    assert torch.equal(torch.randn(3), expected)
