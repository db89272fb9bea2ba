"""ddpm-fast convert as a person calls it: from and to everything, what is refused, what is kept."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import openai_unet
import pytest
import torch
from tiny_run import write_run
from unet_weights import assert_same_weights, randomised

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.cli import main
from ddpm_fast.training.checkpoints import load_model

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

OPENAI = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    config = UNetConfig(
        image_size=8, channels=(8, 16), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
    )
    model = randomised(UNet(config))
    model.save_pretrained(folder / "ours")
    model.to_diffusers().save_pretrained(folder / "theirs")
    pipeline = diffusers.DDPMPipeline(model.to_diffusers(), diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder / "pipeline")
    write_run(folder / "run")
    theirs = randomised(openai_unet.create_model(**OPENAI))
    torch.save(theirs.state_dict(), folder / "ema.pt")
    (folder / "ema.json").write_text(json.dumps(OPENAI))
    return folder


@pytest.fixture
def convert(sources, monkeypatch, capsys, tmp_path):
    """Runs the command on sources by name; its status, and what it said."""
    monkeypatch.chdir(sources)
    capsys.readouterr()

    def call(source, *arguments, to=tmp_path / "out"):
        status = main(["convert", str(source), str(to), *map(str, arguments)])
        said = capsys.readouterr()
        lines = (said.out + said.err).splitlines()
        assert len(lines) == 1
        assert bool(said.out) == (status == 0)
        return status, lines[0]

    return call


def fails(call, *arguments, status=2, **options):
    found, line = call(*arguments, **options)
    assert found == status
    assert line.startswith("ddpm-fast convert: ")
    return line


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("source", ["theirs", "pipeline"])
def test_from_diffusers(sources, convert, tmp_path, source):
    out = tmp_path / "out"
    count = sum(p.numel() for p in UNet.from_pretrained(sources / "ours").parameters())
    assert convert(source) == (
        0,
        f"converted diffusers' {source} to ddpm_fast in {out}: {count:,} parameters, float32",
    )
    assert names(out) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["out"]
    assert_same_weights(UNet.from_pretrained(out), UNet.from_pretrained(sources / "ours"))


def test_to_diffusers(sources, convert, tmp_path):
    status, line = convert("ours", to=tmp_path / "new" / "out")
    assert (status, line.split(":")[0]) == (
        0,
        f"converted ddpm_fast's ours to diffusers in {tmp_path / 'new' / 'out'}",
    )
    out = tmp_path / "new" / "out"
    assert names(out) == ["config.json", "diffusion_pytorch_model.safetensors"]
    theirs = diffusers.UNet2DModel.from_pretrained(out)
    assert_same_weights(theirs, diffusers.UNet2DModel.from_pretrained(sources / "theirs"))
    assert json.loads((out / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_from_openai(sources, convert, tmp_path):
    assert convert("ema.pt", "--config", "ema.json")[0] == 0
    expected = UNet.from_openai(sources / "ema.pt", OPENAI)
    assert_same_weights(UNet.from_pretrained(tmp_path / "out"), expected)
    assert UNet.from_pretrained(tmp_path / "out").config == expected.config
    # the option of heads for attention at one width can be diffusers'
    status, line = convert("ema.pt", "--config", "ema.json", "--to", "diffusers", to=tmp_path / "b")
    assert (status, "to diffusers" in line) == (0, True)
    assert_same_weights(UNet.from_diffusers(tmp_path / "b"), expected)


@pytest.mark.parametrize(
    ("ema", "what"),
    [((), "average 0.9"), (("--ema", 0.99), "average 0.99"), (("--ema", "none"), "the weights")],
)
@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/step-00000200"])
def test_from_a_run(sources, convert, tmp_path, ema, what, place):
    status, line = convert(place, "--to", "ddpm_fast", *ema)
    assert status == 0
    assert line.startswith(f"converted {what} of step 200 of {place} to ddpm_fast")
    rate = {"average 0.9": 0.9, "average 0.99": 0.99}.get(what)
    expected = load_model(sources / "run", rate).model
    assert_same_weights(UNet.from_pretrained(tmp_path / "out"), expected)


def test_a_run_to_diffusers_with_its_null_class(sources, convert, tmp_path):
    assert convert("run")[0] == 0
    expected = load_model(sources / "run").model
    assert convert(tmp_path / "out", "--null-class", to=tmp_path / "back")[0] == 0
    found = UNet.from_pretrained(tmp_path / "back")
    assert_same_weights(found, expected)
    assert (found.config.num_classes, found.config.null_class) == (10, True)
    assert convert(tmp_path / "out", to=tmp_path / "eleven")[0] == 0
    config = UNet.from_pretrained(tmp_path / "eleven").config
    assert (config.num_classes, config.null_class) == (11, False)


def test_the_side_of_images(sources, convert, tmp_path):
    model = UNet.from_pretrained(sources / "ours").to_diffusers()
    model.register_to_config(sample_size=None)
    model.save_pretrained(tmp_path / "source")
    assert "say it by image_size" in fails(convert, tmp_path / "source")
    assert convert(tmp_path / "source", "--image-size", 16)[0] == 0
    assert UNet.from_pretrained(tmp_path / "out").config.image_size == 16


def test_variants(sources, convert, tmp_path):
    model = UNet.from_pretrained(sources / "ours").half()
    model.to_diffusers().save_pretrained(tmp_path / "source", variant="fp16")
    assert "_model.safetensors is missing; there is" in fails(convert, tmp_path / "source")
    status, line = convert(tmp_path / "source", "--variant", "fp16")
    assert (status, line.endswith("float16")) == (0, True)
    assert_same_weights(UNet.from_pretrained(tmp_path / "out"), model)


def test_what_is_there_is_kept(sources, convert, tmp_path):
    out = tmp_path / "out"
    assert convert("ours", "--to", "ddpm_fast")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is there already; take another DST, or --overwrite" in fails(convert, "theirs")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert convert("ours", "--to", "diffusers", "--overwrite")[0] == 0
    assert names(out) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert convert(out, "--overwrite")[0] == 0  # over its own source
    assert names(out) == ["config.json", "model.safetensors"]
    assert_same_weights(UNet.from_pretrained(out), UNet.from_pretrained(sources / "ours"))
    (out / "thesis.txt").touch()
    line = fails(convert, "theirs", "--overwrite")
    assert "no converted model, thesis.txt: it is not overwritten" in line
    assert (out / "thesis.txt").exists()
    (tmp_path / "file").write_text("x")
    assert "is a file" in fails(convert, "theirs", "--overwrite", to=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert convert("theirs", to=tmp_path / "empty")[0] == 0
    assert names(tmp_path) == ["empty", "file", "out"]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    line = fails(convert, "ours", "--to", "diffusers", "--overwrite", to=tmp_path / "vae")
    assert "holds AutoencoderKL: it is not overwritten" in line
    assert names(tmp_path / "vae") == ["config.json"]


def test_pipelines_stay_whole(sources, convert, tmp_path):
    """Where diffusers looks for a component, only diffusers' format goes."""
    pipeline, unet = tmp_path / "pipeline", tmp_path / "pipeline" / "unet"
    shutil.copytree(sources / "pipeline", pipeline)
    (tmp_path / "link").symlink_to(unet)
    before = {path.name: path.read_bytes() for path in unet.iterdir()}
    for source in (unet, "run"):
        for target in (unet, tmp_path / "link"):
            line = fails(convert, source, "--to", "ddpm_fast", "--overwrite", to=target)
            assert "in a pipeline of diffusers, which reads diffusers' format only: " in line
            assert "--to diffusers" in line
    assert {path.name: path.read_bytes() for path in unet.iterdir()} == before
    shutil.rmtree(unet)
    assert "in a pipeline of diffusers" in fails(convert, "theirs", to=unet)
    assert not unet.exists()
    assert convert("ours", to=unet)[0] == 0
    assert convert(unet, "--to", "diffusers", "--overwrite", to=unet)[0] == 0
    found = diffusers.UNet2DModel.from_pretrained(pipeline, subfolder="unet")
    assert_same_weights(found, diffusers.UNet2DModel.from_pretrained(sources / "theirs"))
    # and a link there to a folder elsewhere
    unet.rename(tmp_path / "elsewhere")
    unet.symlink_to(tmp_path / "elsewhere")
    assert "in a pipeline of diffusers" in fails(convert, "theirs", "--overwrite", to=unet)


@pytest.mark.parametrize("to", ["ddpm_fast", "diffusers"])
@pytest.mark.parametrize("failure", ["writing", "moving"])
def test_failures_leave_nothing_half_written(sources, convert, tmp_path, monkeypatch, to, failure):
    out = tmp_path / "out"
    assert convert("ours", "--to", "ddpm_fast")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = os.rename

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    def refuse_the_new(source, target):
        if str(source).endswith(".partial"):
            refuse()
        real(source, target)

    if failure == "moving":
        monkeypatch.setattr(os, "rename", refuse_the_new)
    elif to == "ddpm_fast":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        from safetensors import SafetensorError

        def full(*_, **__):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", full)
    line = fails(convert, "theirs", "--to", to, "--overwrite", status=1)
    assert f"cannot write {out}: " in line
    assert "No space left on device" in line
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == ["out"]


def test_mistakes(sources, convert, tmp_path):
    assert "there is nothing at nowhere" in fails(convert, "nowhere")
    assert "give OpenAI's in --config" in fails(convert, "ema.pt")
    assert "No such file" in fails(convert, "ema.pt", "--config", "no.json")
    assert "--config is of OpenAI's .pt files" in fails(convert, "ours", "--config", "ema.json")
    assert "--ema is of training runs; theirs is none" in fails(convert, "theirs", "--ema", 0.9)
    assert "--image-size is of diffusers' fold" in fails(convert, "run", "--image-size", 8)
    assert "--null-class is of diffusers' fold" in fails(convert, "run", "--null-class")
    assert "--variant is of diffusers' fold" in fails(convert, "ours", "--variant", "fp16")
    assert "ema must be one of [0.9, 0.99]" in fails(convert, "run", "--ema", 0.5)
    (tmp_path / "list.json").write_text("[1]")
    line = fails(convert, "ema.pt", "--config", tmp_path / "list.json")
    assert "must hold an object" in line
    (tmp_path / "list.json").write_text(json.dumps(OPENAI | {"learn_sigma": True}))
    line = fails(convert, "ema.pt", "--config", tmp_path / "list.json")
    assert "ema.pt does not fit its config: out.2.weight has shape" in line
    (tmp_path / "list.json").write_text(json.dumps({"lern_sigma": True}))
    line = fails(convert, "ema.pt", "--config", tmp_path / "list.json")
    assert "option lern_sigma=True is unknown" in line
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in fails(convert, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_what_diffusers_cannot_be(convert, tmp_path):
    config = UNetConfig(image_size=8, channels=(8, 16), attention_resolutions=(), norm_groups=4,
                        downsample=("pool",))  # fmt: skip
    UNet(config).save_pretrained(tmp_path / "pool")
    assert "downsample='pool' has no equivalent" in fails(convert, tmp_path / "pool")
    assert names(tmp_path) == ["pool"]


def test_without_diffusers(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    status, line = convert("ours")
    assert (status, "pip install 'ddpm_fast[diffusers]'" in line) == (2, True)
    assert convert("pipeline")[0] == 0
