"""ddpm-fast as a person calls it, and a demo cut short."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from ddpm_fast import NoiseSchedule, Sampler, UNet
from ddpm_fast.cli import main
from ddpm_fast.training import digits
from ddpm_fast.training.checkpoints import load_model


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert ddpm_fast.__version__ in out
    for name in ("reference", "cpu", "cuda", "triton"):
        assert name in out


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    for arguments in ([], ["paint"], ["demo", "--train-steps", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_digits_are_split_by_class():
    data = digits.load_digits()
    assert len(data.train_labels) + len(data.held_out_labels) == 1797
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert data.train_images.max() == 255
    share = torch.bincount(data.held_out_labels) / torch.bincount(data.train_labels)
    assert (share - 0.25).abs().max() < 0.02
    train = {image.numpy().tobytes() for image in data.train_images}
    repeated = sum(image.numpy().tobytes() in train for image in data.held_out_images)
    assert repeated == 0


def test_judge_knows_real_digits():
    data = digits.load_digits()
    judge = digits.Judge(data)
    images, labels = data.held_out_images[:, 0].numpy(), data.held_out_labels
    assert judge.accuracy(images, labels) > 0.97
    assert judge.accuracy(images, labels.roll(1)) < 0.3
    assert judge.accuracy(255 - images, labels) < 0.5


def test_demo_writes_everything(tmp_path, capsys):
    """A few steps only: the files are there and say what was done; the digits are noise."""
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--train-steps", "12", "--quiet"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint",
        "denoising.gif",
        "loss.png",
        "report.json",
        "samples.png",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["train_steps"] == 12
    assert report["generated"] == 500
    assert 0 <= report["accuracy_on_generated"] < 0.9
    assert report["accuracy_on_held_out_real"] > 0.97
    assert report["loss_last_100_steps"] > 0
    for name in ("samples.png", "loss.png", "denoising.gif"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 100
    with Image.open(out / "denoising.gif") as image:
        assert image.n_frames > 20
    assert "generated digits recognised" in capsys.readouterr().out
    check_commands_take(out / "checkpoint", tmp_path)


def check_commands_take(checkpoint, folder):
    """Every command that takes a run's takes the demo's; its images are of the same model."""
    unet, loaded = UNet.from_pretrained(checkpoint), load_model(checkpoint)
    assert loaded.step == 12
    assert loaded.class_names == [str(label) for label in range(10)]
    for a, b in zip(unet.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    quiet = ["--device", "cpu", "--quiet"]
    few = ["--num", "3", "--seed", "7", "--num-steps", "2", "--guidance", "1.5"]
    assert main(["sample", str(checkpoint), "--out", str(folder / "few"), *few, *quiet]) == 0
    sampler = Sampler(loaded.model, NoiseSchedule.cosine(1000), num_steps=2, guidance_scale=1.5)
    x = sampler.sample(
        [3, 1, 8, 8],
        seed=7,
        model_kwargs={"class_labels": torch.arange(3)},
        uncond_kwargs={"class_labels": None},
    )
    with Image.open(folder / "few" / "000002.png") as image:
        drawn = torch.from_numpy(np.array(image)) / 127.5 - 1
    assert (drawn - x[2, 0].clamp(-1, 1)).abs().max() < 1.01 / 127.5
    bound = ["--data", "digits", "--num", "4", "--bits-per-dim", "--num-timesteps", "3"]
    assert main(["evaluate", str(checkpoint), *bound, *quiet]) == 0
    assert main(["convert", str(checkpoint), str(folder / "unet"), "--to", "ddpm_fast"]) == 0
    again = UNet.from_pretrained(folder / "unet")
    for a, b in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_demo_is_a_function_of_its_seed(tmp_path):
    config = digits.DigitsConfig(train_steps=3)
    data, schedule = digits.load_digits(), ddpm_fast.NoiseSchedule.cosine()
    first, losses = digits.train(data, schedule, config, progress=False)
    second, again = digits.train(data, schedule, config, progress=False)
    assert losses == again
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_demo_into_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file"), "--train-steps", "1", "--quiet"]) == 2
    assert "cannot write to" in capsys.readouterr().err
