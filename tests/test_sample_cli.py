"""ddpm-fast sample as a person calls it: files, what is skipped, several processes, mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_run import write_run

from ddpm_fast import Sampler
from ddpm_fast.cli import main
from ddpm_fast.training.checkpoints import load_model
from ddpm_fast.training.pictures import grid, png, png_text, read_png, to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def sample(run, out, *arguments):
    return main(["sample", str(run), "--out", str(out), "--quiet", *map(str, arguments)])


def pixels(out):
    return {path.name: read_png(path) for path in sorted(out.glob("[0-9]*.png"))}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(int((a[name].int() - b[name].int()).abs().max()) for name in a)


# Pictures -----------------------------------------------------------------------------------


def test_pixels_are_rounded_to_the_nearest():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert torch.equal(to_uint8((levels.float() + 0.49) / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_keeps_every_pixel(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png(image, "words"))
    assert torch.equal(read_png(path), image)
    assert png_text(path) == "words"
    path.write_bytes(png(image))
    assert png_text(path) is None
    with pytest.raises(ValueError, match="1 to 4 channels"):
        png(torch.zeros(5, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(("count", "size"), [(1, (10, 12)), (10, (82, 12)), (23, (82, 32))])
def test_grid_shows_every_image_once(tmp_path, count, size):
    images = torch.randint(1, 256, (count, 3, 8, 6), dtype=torch.uint8)
    (tmp_path / "grid.png").write_bytes(grid(images))
    sheet = read_png(tmp_path / "grid.png")
    assert sheet.shape == (3, size[1], size[0])
    for i, image in enumerate(images):
        top, left = 2 + i // 10 * 10, 2 + i % 10 * 8
        assert torch.equal(sheet[:, top : top + 8, left : left + 6], image)
    assert int((sheet > 0).sum()) == images.numel()


# The command --------------------------------------------------------------------------------


def test_files_are_the_samplers_images(run, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert sample(run, out, "--num", 13, "--seed", 7, "--batch-size", 5) == 0
    names = [f"{i:06d}.png" for i in range(13)]
    assert sorted(os.listdir(out)) == [*names, "grid.png"]
    loaded = load_model(run)
    loss = loaded.config.loss
    sampler = Sampler(
        loaded.model,
        loaded.config.build_schedule(),
        prediction=loss.prediction,
        variance=loss.variance,
    )
    labels = {"class_labels": torch.arange(13) % 10}
    expected = to_uint8(sampler.sample([13, 1, 8, 8], seed=7, model_kwargs=labels))
    drawn = torch.stack(list(pixels(out).values()))
    assert int((drawn.int() - expected.int()).abs().max()) <= 1
    assert drawn.float().std() > 20  # something is on them
    assert (out / "grid.png").read_bytes() == grid(drawn)
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"drew 13 of images 0 … 12 in {out} in \d.* \(\d.* images/s\), by the model of step 200\n",
        said,
    )


def test_an_image_does_not_depend_on_the_others(run, tmp_path):
    sample(run, tmp_path / "a", "--num", 9, "--batch-size", 9)
    sample(run, tmp_path / "b", "--num", 9, "--batch-size", 2)
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert largest_difference(a, b) <= 1
    sample(run, tmp_path / "c", "--num", 9, "--seed", 1)
    assert largest_difference(a, pixels(tmp_path / "c")) > 50


@pytest.mark.parametrize(
    "options",
    [
        ("--class", 3),
        ("--method", "ddim", "--num-steps", 5),
        ("--method", "ddim", "--num-steps", 5, "--eta", 1),
        ("--method", "ddim", "--num-steps", 5, "--spacing", "trailing"),
        ("--guidance", 3),
        ("--ema", 0.99),
        ("--ema", "none"),
        ("--precision", "bf16"),
    ],
)
def test_options_change_the_images(run, tmp_path, options):
    sample(run, tmp_path / "plain", "--num", 4)
    assert sample(run, tmp_path / "other", "--num", 4, *options) == 0
    assert largest_difference(pixels(tmp_path / "plain"), pixels(tmp_path / "other")) > 2


def test_the_class_asked_for_is_drawn(run, tmp_path):
    sample(run, tmp_path / "all", "--num", 14)
    sample(run, tmp_path / "three", "--num", 14, "--class", 3)
    a, b = pixels(tmp_path / "all"), pixels(tmp_path / "three")
    for i in range(14):
        name = f"{i:06d}.png"
        same = int((a[name].int() - b[name].int()).abs().max()) <= 1
        assert same == (i % 10 == 3)


@pytest.mark.parametrize(
    "settings", [{"num_classes": None}, {"variance": "learned_range"}, {"label_dropout": 0.0}]
)
def test_other_models(tmp_path, settings):
    run = write_run(tmp_path / "run", **settings)
    assert sample(run, tmp_path / "out", "--num", 2) == 0


# What is there already ----------------------------------------------------------------------


def test_whole_batches_are_skipped(run, tmp_path, capsys):
    sample(run, tmp_path, "--num", 12, "--batch-size", 4)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "000005.png").unlink()
    (tmp_path / ".000006.png.123.partial").write_bytes(b"killed here")
    capsys.readouterr()
    assert sample(run, tmp_path, "--num", 12, "--batch-size", 4) == 0
    assert "drew 4 of images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    again = {
        path.name for path in tmp_path.glob("0*") if path.stat().st_mtime_ns != times[path.name]
    }
    assert again == {f"{i:06d}.png" for i in range(4, 8)}


def test_images_drawn_otherwise_are_not_mixed_in(run, tmp_path, capsys):
    sample(run, tmp_path, "--num", 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sample(run, tmp_path, "--num", 3, "--seed", 1) == 2
    assert "000000.png is there, and was not drawn with this model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sample(run, tmp_path, "--num", 3, "--seed", 1, "--overwrite") == 0
    sample(run, tmp_path / "fresh", "--num", 3, "--seed", 1)
    for name in before:
        assert (tmp_path / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    Image.new("L", (8, 8)).save(foreign / "000001.png")
    assert sample(run, foreign, "--num", 3) == 2
    (foreign / "000001.png").write_text("not even an image")
    assert sample(run, foreign, "--num", 3) == 2


# Several processes --------------------------------------------------------------------------


def torchrun(processes, run, out, *arguments):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = ["-m", "ddpm_fast.cli", "--", "sample", str(run), "--out", str(out), "--quiet"]
    return subprocess.run(
        [sys.executable, *launcher, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_draw_what_one_does(run, tmp_path):
    arguments = ("--num", 23, "--batch-size", 4, "--seed", 3)
    sample(run, tmp_path / "one", *arguments)
    result = torchrun(2, run, tmp_path / "two", *arguments)
    assert result.returncode == 0, result.stderr
    assert "process 0 of 2: drew 12" in result.stdout
    assert "process 1 of 2: drew 11" in result.stdout
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert largest_difference(one, two) <= 1
    assert (tmp_path / "two" / "grid.png").read_bytes() == grid(torch.stack(list(two.values())))


def test_each_process_goes_its_own_way(run, tmp_path, monkeypatch, capsys):
    """By hand, one after the other: the last of them makes the grid, whichever it is."""
    arguments = ("--num", 10, "--batch-size", 2)
    sample(run, tmp_path / "one", *arguments)
    monkeypatch.setenv("WORLD_SIZE", "3")
    out = tmp_path / "three"
    for rank, expected in ((1, {2, 3, 8, 9}), (0, {0, 1, 6, 7}), (2, {4, 5})):
        assert not (out / "grid.png").exists()
        before = set(os.listdir(out)) if out.exists() else set()
        monkeypatch.setenv("RANK", str(rank))
        assert sample(run, out, *arguments) == 0
        new = {int(name[:6]) for name in set(os.listdir(out)) - before - {"grid.png"}}
        assert new == expected
    assert largest_difference(pixels(tmp_path / "one"), pixels(out)) <= 1
    assert (out / "grid.png").exists()


@pytest.mark.slow
def test_processes_do_not_wait_for_one_that_fails(run, tmp_path):
    out = tmp_path / "out"
    sample(run, out, "--num", 4, "--batch-size", 4, "--seed", 9)
    result = torchrun(2, run, out, "--num", 8, "--batch-size", 4)
    assert result.returncode != 0
    assert "was not drawn with this model" in result.stderr


# Mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num", 0), "must be at least 1"),
        (("--num", -3), "--num/--num-images: must be at least 1"),
        (("--num", "1e3"), "--num/--num-images: invalid positive value: '1e3'"),
        (("--num", 1 << 63), "num must lie in 1 … 2^63 - 1; got 9223372036854775808"),
        (("--num", 3, "--class", 10), "class must lie in 0 … 9; got 10"),
        (("--num", 3, "--class", -1), "--class: must be at least 0"),
        (("--num", 3, "--seed", 1 << 64), "--seed: must lie in 0 … 2^64 - 1"),
        (("--num", 3, "--num-steps", 21), "num_steps must be an integer in 1 … 20; got 21"),
        (("--num", 3, "--num-steps", 0), "--num-steps: must be at least 1"),
        (("--num", 3, "--method", "euler"), "invalid choice: 'euler'"),
        (("--num", 3, "--method", "ddim", "--eta", 2), "eta must lie in 0 … 1; got 2.0"),
        (("--num", 3, "--eta", 1), "--eta is of --method ddim"),
        (("--num", 3, "--guidance", "nan"), "--guidance: must be finite"),
        (("--num", 3, "--ema", 0.5), "ema must be one of [0.9, 0.99]"),
        (("--num", 3, "--ema", "last"), "must be a rate, or none; got 'last'"),
        (("--num", 3, "--device", "tpu"), "--device must be cpu or cuda; got 'tpu'"),
        (("--num", 3, "--batch-size", 0), "--batch-size: must be at least 1"),
    ],
)
def test_arguments_out_of_range(run, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    try:
        status = sample(run, out, *arguments)
    except SystemExit as stopped:  # argparse's
        status = stopped.code
    said = capsys.readouterr().err
    assert (status, message in said, "Traceback" in said) == (2, True, False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "option", "message"),
    [
        ({"num_classes": None}, ("--class", 1), "a class is given, and the model was trained"),
        ({"num_classes": None}, ("--guidance", 2), "a guidance scale is given, and the model"),
        ({"label_dropout": 0.0}, ("--guidance", 2), "trained without label dropout"),
    ],
)
def test_what_the_model_has_not_learned(tmp_path, capsys, settings, option, message):
    run = write_run(tmp_path / "run", **settings)
    assert sample(run, tmp_path / "out", "--num", 1, *option) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_no_checkpoint(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        assert sample(tmp_path / name, tmp_path / "out", "--num", 1) == 2
        said = capsys.readouterr().err
        assert "checkpoint" in said
        assert str(tmp_path / name) in said
        assert said.count("\n") == 1


def test_a_checkpoint_cut_short(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, symlinks=True)
    weights = broken / "checkpoints" / "step-00000200" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert sample(broken, tmp_path / "out", "--num", 1) == 2
    assert "it was cut short" in capsys.readouterr().err


def test_nan_is_not_drawn(tmp_path, capsys):
    run = write_run(tmp_path / "run", spoiled=True)
    assert sample(run, tmp_path / "out", "--num", 2, "--ema", "none") == 1
    said = capsys.readouterr().err
    assert "NaN at step 0" in said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert sample(run, tmp_path / "file", "--num", 1) == 2
    assert "it is a file" in capsys.readouterr().err
    assert sample(run, tmp_path / "file" / "below", "--num", 1) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_images_beyond_those_asked_for_are_told_of(run, tmp_path, capsys):
    few = ["--method", "ddim", "--num-steps", 2]
    assert sample(run, tmp_path, "--num", 5, *few) == 0
    assert sample(run, tmp_path, "--num", 3, *few) == 0
    assert capsys.readouterr().err == ""
    assert sample(run, tmp_path, "--num", 3, "--overwrite", "--seed", 1, *few) == 0
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path} holds 2 images of numbers from 3 on, drawn before: they stay as they were\n"
    )
    assert len(pixels(tmp_path)) == 5
