"""UNets from the files that diffusers writes and wrote, and what is wrong with others."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from unet2d_models import OURS, SMALL, theirs_of
from unet_weights import assert_same_weights

from ddpm_fast import UNet

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small():
    return theirs_of(SMALL)


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


NO_SAFETENSORS = {"safe_serialization": False}


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
@pytest.mark.parametrize("size", ["20KB", "1GB"])
@pytest.mark.parametrize("form", [{}, NO_SAFETENSORS])
def test_all_that_diffusers_writes(tmp_path, small, variant, size, form):
    """In one file or in several, of either kind, with a variant beside other weights or alone."""
    expected = UNet.from_diffusers(small)
    small.save_pretrained(tmp_path / "alone", variant=variant, max_shard_size=size, **form)
    other = theirs_of(SMALL, 1)
    other.save_pretrained(tmp_path / "beside", variant=None if variant else "fp16", **form)
    small.save_pretrained(tmp_path / "beside", variant=variant, max_shard_size=size, **form)
    suffix = "*.bin" if form else "*.safetensors"
    assert (len(list((tmp_path / "alone").glob(suffix))) > 2) == (size == "20KB")
    for name in ("alone", "beside"):
        assert_same_weights(UNet.from_diffusers(tmp_path / name, variant=variant), expected)
        again = diffusers.UNet2DModel.from_pretrained(
            tmp_path / name, variant=variant, use_safetensors=not form
        )
        assert_same_weights(again, small)


def test_a_variant_of_a_pipeline(tmp_path, small):
    pipeline = diffusers.DDPMPipeline(small.half(), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path, variant="fp16")
    found = UNet.from_diffusers(tmp_path, variant="fp16")
    assert found.dtype == torch.float16
    assert_same_weights(found, UNet.from_diffusers(small))


def test_old_names_of_an_index(tmp_path, small):
    """…safetensors.fp16.index.json, as diffusers before 0.31 wrote it."""
    small.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json")
    found = UNet.from_diffusers(tmp_path, variant="fp16")
    assert_same_weights(found, UNet.from_diffusers(small))


def test_an_index_goes_before_a_file_that_is_whole(tmp_path, small):
    """As with diffusers."""
    theirs_of(SMALL, 1).save_pretrained(tmp_path / "old")
    small.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "old" / name).rename(tmp_path / "new" / name)
    assert_same_weights(diffusers.UNet2DModel.from_pretrained(tmp_path / "new"), small)
    assert_same_weights(UNet.from_diffusers(tmp_path / "new"), UNet.from_diffusers(small))


def test_variants_that_are_not_there(tmp_path, small):
    small.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(
        FileNotFoundError,
        match=r"diffusion_pytorch_model.safetensors is missing; there is "
        r"diffusion_pytorch_model.fp16.safetensors \(a variant is read by its name\)",
    ):
        UNet.from_diffusers(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.bf16.safetensors is mis"):
        UNet.from_diffusers(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="variant='fp16' is of a directory's files"):
        UNet.from_diffusers(small, variant="fp16")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": ["a.bin"]}', '{"weight_map": {}}'])
def test_an_index_that_says_nothing(tmp_path, small, content):
    small.save_pretrained(tmp_path, max_shard_size="20KB", **NO_SAFETENSORS)
    (tmp_path / "diffusion_pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(ValueError, match="does not say in which files the weights are"):
        UNet.from_diffusers(tmp_path)


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
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB", **NO_SAFETENSORS)
    shard = next((tmp_path / "shards").glob("*00002-of*"))
    torch.save({"evil": Evil(tmp_path / "ran")}, shard)
    with pytest.raises(ValueError, match=r"00002-of-\d+.bin is no whole file of tensors: .* run"):
        UNet.from_diffusers(tmp_path / "shards")
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
    small.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    next((tmp_path / "b").glob("*00002-of*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-\d+.safetensors is missing"):
        UNet.from_diffusers(tmp_path / "b")


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
