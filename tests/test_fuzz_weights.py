"""Damaged models in folders and files: ours, diffusers', OpenAI's."""

from __future__ import annotations

import json

import openai_unet
import pytest
import torch
from fuzzing import fuzz

from ddpm_fast import UNet, UNetConfig

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = UNetConfig(
    image_size=8, in_channels=1, channels=(8, 8), num_res_blocks=1, attention_resolutions=(4,),
    norm_groups=4, num_classes=3,
)  # fmt: skip
OPENAI = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "channel_mult": "1",
    "attention_resolutions": "8",
}


def check_whole(model, name):
    """Every weight has a value, of memory of its own."""
    assert isinstance(model, UNet)
    assert not model.training
    assert all(not p.is_meta and p.is_floating_point() for p in model.state_dict().values())


def test_our_own(tmp_path):
    torch.manual_seed(0)
    UNet(CONFIG).save_pretrained(tmp_path / "whole")
    fuzz(tmp_path / "whole", tmp_path, UNet.from_pretrained, 250, check=check_whole)


@pytest.mark.parametrize("form", ["whole", "shards", "bin"])
def test_diffusers(tmp_path, form):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = UNet(CONFIG).to_diffusers()
    options = {"max_shard_size": "20KB"} if form == "shards" else {}
    model.save_pretrained(tmp_path / "whole", safe_serialization=form != "bin", **options)
    fuzz(tmp_path / "whole", tmp_path, UNet.from_diffusers, 80, check=check_whole)


@pytest.mark.parametrize("form", ["model.pt", "legacy.pt", "model.safetensors"])
def test_openai(tmp_path, form):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = openai_unet.create_model(**OPENAI).state_dict()
    (tmp_path / "whole").mkdir()
    path = tmp_path / "whole" / form
    if form.endswith(".pt"):
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy.pt")
    else:
        save_file(state, path)
    fuzz(
        tmp_path / "whole", tmp_path,
        lambda folder: UNet.from_openai(folder / form, OPENAI), 80, check=check_whole,
    )  # fmt: skip


def test_openai_options(tmp_path):
    """Of anything that JSON can be, against weights that are whole."""
    torch.manual_seed(0)
    state = openai_unet.create_model(**OPENAI).state_dict()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "options.json").write_text(json.dumps(OPENAI))

    def read(folder):
        try:
            options = json.loads((folder / "options.json").read_text())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(options, dict):
            return None
        try:
            return UNet.from_openai(state, options)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    fuzz(tmp_path / "whole", tmp_path, read, 200, check=check_whole)
