"""Bits/dim and the Fréchet distance of a trained model, by the API and by ddpm-fast evaluate."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_run

from ddpm_fast import bits_per_dim
from ddpm_fast.cli import main
from ddpm_fast.training.checkpoints import load_model
from ddpm_fast.training.data import TensorImages, data_order, open_data
from ddpm_fast.training.draw import Artist, DrawConfig
from ddpm_fast.training.evaluate import evaluate_bits_per_dim, evaluate_frechet
from ddpm_fast.training.frechet import Moments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def classless(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "classless", num_classes=None)


@pytest.fixture(scope="module")
def data():
    return open_data("digits", channels=1, split="test")


class Means:
    """Features of which a person can say what they are: the means of the image's halves."""

    name = "means"

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return images.double().flatten(1).unflatten(1, (2, -1)).mean(2)


def evaluate(run, data, *arguments):
    return main(["evaluate", str(run), "--data", str(data), "--quiet", *map(str, arguments)])


# API ----------------------------------------------------------------------------------------


def test_bits_per_dim_of_a_data_set(run, data):
    """Those of the images, their own labels with them, whatever the batches are."""
    found = evaluate_bits_per_dim(load_model(run), data, num=50, seed=3, batch_size=16)
    loaded = load_model(run)
    images, labels = data.batch(data_order(len(data), 0, 50, seed=3).tolist())
    loss = loaded.config.loss
    bits = bits_per_dim(
        loaded.model,
        images,
        loaded.config.build_schedule(),
        prediction=loss.prediction,
        variance=loss.variance,
        seed=3,
        model_kwargs={"class_labels": labels},
    )
    total = bits.total.double()
    assert found["mean"] == pytest.approx(float(total.mean()), rel=1e-5)
    assert found["standard_error"] == pytest.approx(float(total.std()) / 50**0.5, rel=1e-4)
    assert found["standard_error_of_timesteps"] == 0
    assert found["prior"] == pytest.approx(float(bits.prior.mean()), rel=1e-4)
    assert found["decoder"] == pytest.approx(float(bits.vlb[:, 0].mean()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(bits.vlb[:, 1:].sum(1).mean()), rel=1e-4)
    assert (found["images"], found["timesteps"]) == (50, 20)
    wrong = bits_per_dim(
        loaded.model,
        images,
        loaded.config.build_schedule(),
        prediction=loss.prediction,
        variance=loss.variance,
        seed=3,
        model_kwargs={"class_labels": (labels + 1) % 10},
    )
    assert abs(wrong.mean - found["mean"]) > 1e-3  # labels matter


def test_some_timesteps_estimate_all(run, data):
    """Within four standard errors of the timesteps; false alarm 6e-5."""
    whole = evaluate_bits_per_dim(load_model(run), data, num=200)
    part = evaluate_bits_per_dim(load_model(run), data, num=200, num_timesteps=5)
    assert part["timesteps"] == 5
    assert 0 < part["standard_error_of_timesteps"] < part["standard_error"]
    apart = abs(part["mean"] - whole["mean"])
    assert 0 < apart < 4 * part["standard_error_of_timesteps"]
    assert part["prior"] == pytest.approx(whole["prior"])
    assert part["decoder"] == pytest.approx(whole["decoder"])


def test_frechet_distance_of_samples(run, data):
    artist = Artist.of(load_model(run), DrawConfig(seed=5, method="ddim", num_steps=4))
    found = evaluate_frechet(artist, data, Means(), num=40, num_samples=30, batch_size=16)
    images, labels = data.batch(data_order(len(data), 0, 40, seed=5).tolist())
    real, drawn = Moments(), Moments()
    real.update(Means()(images))
    drawn.update(Means()(artist.images(range(30), labels[:30])))
    assert found["distance"] == pytest.approx(real.distance(drawn), rel=0.02)  # a grey level
    assert found == {
        "distance": found["distance"],
        "features": "means",
        "dimensions": 2,
        "images": 40,
        "samples": 30,
    }
    one_class = Artist.of(load_model(run), DrawConfig(seed=5, num_steps=4, class_label=1))
    assert evaluate_frechet(one_class, data, Means(), num=40)["samples"] == 40


def test_what_cannot_be_measured(run, data, tmp_path):
    loaded = load_model(run)
    for measure in (
        lambda num: evaluate_bits_per_dim(loaded, data, num=num),
        lambda num: evaluate_frechet(Artist.of(loaded, DrawConfig()), data, Means(), num=num),
    ):
        for num in (0, 361):
            with pytest.raises(ValueError, match=f"num must lie in . … 360.*got {num}"):
                measure(num)
    artist = Artist.of(loaded, DrawConfig(num_steps=2))
    with pytest.raises(ValueError, match="num_samples must be at least 2; got 1"):
        evaluate_frechet(artist, data, Means(), num_samples=1)
    with pytest.raises(ValueError, match="the data has no labels"):
        evaluate_frechet(artist, TensorImages(data.batch(range(5))[0]), Means())
    spoiled = load_model(write_run(tmp_path, spoiled=True), None)
    with pytest.raises(FloatingPointError, match="the bound is not finite"):
        evaluate_bits_per_dim(spoiled, data, num=4)


# Command ------------------------------------------------------------------------------------


def test_digits_are_measured_both_ways(run, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    arguments = ("--num", 40, "--num-steps", 4, "--method", "ddim", "--out", out)
    assert evaluate(run, "digits", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(out.read_text())
    bits, frechet = report["bits_per_dim"], report["frechet"]
    assert lines[0].startswith(f"{bits['mean']:.4f} ± {bits['standard_error']:.4f} bits/dim")
    assert lines[1].startswith(f"Fréchet distance {frechet['distance']:.4f} (digits features)")
    assert bits["mean"] == pytest.approx(bits["prior"] + bits["kl"] + bits["decoder"])
    assert (report["step"], report["split"], frechet["samples"]) == (200, "test", 40)
    assert evaluate(run, "digits", *arguments[:-2], "--out", tmp_path / "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == report
    assert evaluate(run, "digits", *arguments[:-1], out, "--split", "train") == 0
    assert json.loads(out.read_text())["bits_per_dim"] != bits


def test_one_of_the_two(run, capsys):
    assert evaluate(run, "digits", "--num", 1, "--bits-per-dim", "--num-timesteps", 4) == 0
    said = capsys.readouterr().out
    assert "of 1 image, 4 timesteps each" in said
    assert "Fréchet" not in said
    options = ("--num-samples", 12, "--num-steps", 2, "--guidance", 2, "--ema", "none")
    assert evaluate(run, "digits", "--num", 10, "--frechet", *options) == 0
    said = capsys.readouterr().out
    assert "between 12 samples and 10 images" in said
    assert "bits/dim" not in said


def write_images(folder, count, spoil=()):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for i in spoil:
        (folder / f"{i}.png").write_text("no image")
    return folder


def test_a_folder(classless, tmp_path, capsys):
    folder = write_images(tmp_path / "images", 6)
    assert evaluate(classless, folder) == 0
    said = capsys.readouterr().out
    assert "of 6 images" in said
    assert "Fréchet" not in said  # nobody asked for torch-fidelity's Inception
    options = ("--frechet", "--features", "digits", "--num-steps", 2)
    assert evaluate(classless, folder, *options) == 0


def test_images_that_cannot_be_read(classless, tmp_path, capsys, caplog):
    folder = write_images(tmp_path / "images", 6, spoil=(2, 5))
    assert evaluate(classless, folder) == 2
    assert "cannot read image" in capsys.readouterr().err
    out = tmp_path / "report.json"
    for workers in (0, 1):
        caplog.clear()
        options = ("--on-bad-image", "skip", "--workers", workers, "--out", out)
        assert evaluate(classless, folder, *options) == 0
        assert "2 images could not be read" in capsys.readouterr().out
        assert json.loads(out.read_text())["images_skipped"] == 2
        assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num", 361), "num must lie in 2 … 360"),
        (("--num", 361, "--bits-per-dim"), "num must lie in 1 … 360"),
        (("--num-timesteps", 2), "--num-timesteps must lie in 3 … 20; got 2"),
        (("--num-timesteps", 21), "--num-timesteps must lie in 3 … 20; got 21"),
        (("--num-samples", 1), "--num-samples must be at least 2"),
        (("--num-steps", 21), "num_steps must be an integer in 1 … 20; got 21"),
        (("--split", "validation"), "invalid choice: 'validation'"),
        (("--features", "clip"), "invalid choice: 'clip'"),
        (("--frechet", "--features", "inception"), "pip install torch-fidelity"),
        (("--device", "cuda:77"), "device cuda"),
    ],
)
def test_arguments_out_of_range(run, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    if "cuda:77" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    try:
        status = evaluate(run, "digits", *arguments)
    except SystemExit as stopped:  # argparse's
        status = stopped.code
    said = capsys.readouterr().err
    assert (status, message in said, "Traceback" in said) == (2, True, False)


def test_data_that_does_not_fit(run, classless, tmp_path, capsys):
    flat = write_images(tmp_path / "flat", 3)
    assert evaluate(run, flat) == 2
    assert "has no labels, and 10 classes are asked for" in capsys.readouterr().err
    many = tmp_path / "many"
    many.mkdir()
    for k in range(11):
        write_images(many / f"class{k:02}", 1)
    assert evaluate(run, many) == 2
    assert "'class10' is label 10" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert evaluate(classless, tmp_path / name) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / name) in said
        assert said.count("\n") == 1


def test_where_it_cannot_write(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file" / "below.json"):
        assert evaluate(run, "digits", "--num", 2, "--out", out) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(f"ddpm-fast evaluate: cannot write {out}: ")
        assert captured.out == ""  # said before the work is done


def test_nan_and_torchrun(run, tmp_path, capsys, monkeypatch):
    spoiled = write_run(tmp_path / "run", spoiled=True)
    assert evaluate(spoiled, "digits", "--num", 3, "--ema", "none", "--bits-per-dim") == 1
    assert "the bound is not finite" in capsys.readouterr().err
    assert evaluate(spoiled, "digits", "--num", 3, "--ema", "none", "--frechet") == 1
    assert "NaN at step 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate(run, "digits") == 2
    assert "runs in one process" in capsys.readouterr().err
