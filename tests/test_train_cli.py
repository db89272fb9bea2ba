"""ddpm-fast train as a person calls it: resumed, killed, interrupted, on two processes, misused."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import (
    CHILD,
    READS_FILES,
    TINY,
    assert_same_run,
    command,
    log_of,
    tiny_images,
    torchrun,
)

from ddpm_fast import UNet
from ddpm_fast.cli import main
from ddpm_fast.training import data
from ddpm_fast.training.checkpoints import load_model, read_checkpoint, steps_in
from ddpm_fast.training.config import RunConfig
from ddpm_fast.training.data import data_order, open_data
from ddpm_fast.training.errors import RunError
from ddpm_fast.training.fields import merged
from ddpm_fast.training.lock import RunLock
from ddpm_fast.training.pictures import read_png
from ddpm_fast.training.runs import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path) -> Path:
    return written(tmp_path / "tiny.json", {})


def written(path: Path, over: dict) -> Path:
    path.write_text(json.dumps(merged(TINY, over)))
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with two classes, of images of several sizes and modes."""
    for i in range(24):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise((8 + i % 3, 8 + i % 2), 60 + i)
        picture.convert(("L", "RGB", "RGBA", "P")[i % 4]).save(folder / f"{i:02}.png")
    return tmp_path / "images"


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def test_digits_by_default(tmp_path, capsys):
    """No preset asked for: that of the digits; a finished run is resumed to nothing."""
    out = tmp_path / "run"
    arguments = [
        "--data",
        "digits",
        "--out",
        out,
        "--steps",
        "1",
        "--set",
        "output.sampling_steps=2",
    ]
    assert train(*arguments, "--no-tensorboard") == 0
    saved = json.loads((out / "config.json").read_text())
    assert saved["data"]["path"] == "digits"
    assert saved["unet"]["channels"] == [32, 64]
    assert (saved["unet"]["num_classes"], saved["unet"]["image_size"]) == (10, 8)
    assert (out / "samples" / "step-00000001.png").exists()
    assert "step 1 of 1, saved in" in capsys.readouterr().out
    assert train("--out", out, "--resume") == 0
    assert "nothing left to do: step 1 of 1" in capsys.readouterr().out
    loaded = load_model(out)
    assert loaded.step == 1
    assert loaded.config.build_schedule().alphas_cumprod[-1] < 1e-6  # cosine


def test_200_steps_are_100_and_100(tmp_path, config):
    """Digits, on the CPU, with an interruption between: the same files to the bit."""
    common = ["--data", "digits", "--config", config, "--quiet"]
    assert train(*common, "--out", tmp_path / "a", "--steps", 200) == 0
    assert train(*common, "--out", tmp_path / "b", "--steps", 100) == 0
    assert train("--out", tmp_path / "b", "--steps", 200, "--resume", "--quiet") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert log_of(tmp_path / "a")[-1]["samples"] == 1600
    first, last = (log_of(tmp_path / "a")[i]["loss"] for i in (0, -1))
    assert last < first / 2
    UNet.from_pretrained(tmp_path / "a" / "checkpoints" / "latest")


def test_a_folder_with_workers(tmp_path, config, images, capfd, monkeypatch):
    """Worker processes change nothing; the run goes on with another number of them."""
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    common = ["--data", images, "--config", config, "--quiet", "--image-size", 8]
    common += ["--set", "data.flip=true", "--checkpoint-every", 2]
    assert train(*common, "--out", tmp_path / "a") == 0
    assert train(*common, "--out", tmp_path / "b", "--workers", 2, "--steps", 3) == 0
    resumed = ["--out", tmp_path / "b", "--resume", "--steps", 6, "--quiet", "--workers", 1]
    assert train(*resumed) == 0
    assert train(*resumed[:-1], "0") == 0
    a, b = (read_checkpoint(tmp_path / run / "checkpoints" / "latest") for run in "ab")
    assert a.config.unet.num_classes == 2
    assert a.config.unet.in_channels == 3
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    assert capfd.readouterr().err == ""


# Killed ------------------------------------------------------------------------------------


def killed_again_and_again(tmp_path, images, kills: int, seed: int) -> None:
    """kill -9 at random moments; whatever is there loads, and goes on to the same bits."""
    draw = random.Random(seed)
    over = {"output": {"checkpoint_every": 2, "keep": 2}, "batch_size": 4}
    steps = 40 + 30 * kills
    common = ["--data", images, "--config", written(tmp_path / "config.json", over)]
    common += ["--image-size", "8", "--steps", steps, "--quiet"]
    assert train(*common, "--out", tmp_path / "whole") == 0
    out, hits = tmp_path / "killed", 0
    for _ in range(3 * kills):
        process = subprocess.Popen(command(*common, "--out", out, "--resume"), env=CHILD)
        before = progress(out)
        while progress(out) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        hits += process.wait() == -signal.SIGKILL
        assert load_model(out).step >= before
        UNet.from_pretrained(out / "checkpoints" / "latest")
        if hits == kills:
            break
    assert hits == kills
    assert train(*common, "--out", out, "--resume") == 0
    assert_same_run(tmp_path / "whole", out)
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith((".", "broken"))]


def progress(out: Path) -> int:
    """The step of the newest checkpoint, −1 before the first."""
    return max([-1, *(step for step, _ in steps_in(out / "checkpoints"))])


def test_killed_three_times(tmp_path, images):
    killed_again_and_again(tmp_path, images, kills=3, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, images):
    killed_again_and_again(tmp_path, images, kills=20, seed=1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path, config, images, number, status):
    """Finishes its step, saves, says how to go on; meanwhile no other process gets in."""
    out = tmp_path / "run"
    arguments = ["--data", images, "--config", config, "--image-size", 8, "--out", out]
    arguments += ["--steps", 100_000, "--workers", 1, "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", READS_FILES, *command(*arguments)[3:]],
        env=CHILD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "log.jsonl").exists() or len(log_of_what_is_there(out)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    other = subprocess.run(
        command("--out", out, "--resume"), env=CHILD, capture_output=True, text=True
    )
    assert other.returncode == 1
    assert other.stderr == (
        f"ddpm-fast train: {out} is in use by another process (pid {process.pid}): wait for it, or "
        "take another --out\n"
    )
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "finishing the step and saving" in stderr
    assert "Traceback" not in stderr
    step = load_model(out).step
    assert stdout == (
        f"step {step} of 100000, saved in {out}/checkpoints/latest: stopped; --resume goes on\n"
    )
    assert log_of(out)[-1]["step"] == step
    saved = json.loads((out / "config.json").read_text())
    assert saved["steps"] == 100_000


def log_of_what_is_there(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines()


# Two processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path, config, images, parallel):
    """Half the batch each gives the losses and weights of one process, to float32's rounding; and
    what two have saved one goes on with, and the other way round."""
    common = [
        "--data",
        images,
        "--config",
        config,
        "--image-size",
        "8",
        "--quiet",
        "--grad-accum",
        2,
    ]
    common += ["--set", "data.flip=true", "--device", "cpu", "--checkpoint-every", 2]
    common += ["--sample-every", 4, "--set", "output.sampling_steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(*common, "--out", one) == 0
    done = torchrun(2, *common, "--out", two, "--parallel", parallel, "--steps", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4 of 4") == 1
    assert train("--out", two, "--resume", "--steps", 6, "--quiet") == 0
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    pictures = [read_png(out / "samples" / "step-00000004.png").int() for out in (one, two)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    a, b = (read_checkpoint(out / "checkpoints" / "latest") for out in (one, two))
    for found, expected in ((a.model, b.model), (a.averages[0.9], b.averages[0.9])):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
    assert a.optimizer.keys() == b.optimizer.keys()
    if parallel == "fsdp":
        again = torchrun(
            2, "--out", one, "--resume", "--steps", 8, "--quiet", "--parallel", parallel
        )
        assert again.returncode == 0, again.stderr
        assert train("--out", two, "--resume", "--steps", 8, "--quiet") == 0
        assert log_of(one)[-1]["loss"] == pytest.approx(log_of(two)[-1]["loss"], rel=3e-6)


def test_an_error_of_one_process_ends_all(tmp_path, config, images):
    """An image of the second step that the second process alone meets: the first does not wait for
    it for ever, and what was saved before stays."""
    paths = sorted(images.rglob("*.png"))
    drawn = [paths[i] for i in data_order(len(paths), 0, 16, seed=0).tolist()]
    drawn[13].write_bytes(b"not an image")
    program = tmp_path / "program.py"
    program.write_text(READS_FILES)
    common = ["--data", images, "--config", config, "--image-size", 8, "--quiet"]
    common += ["--device", "cpu", "--checkpoint-every", 1, "--out", tmp_path / "run"]
    done = torchrun(2, *common, program=program)
    assert done.returncode != 0
    assert re.search(
        rf"^ddpm-fast train: cannot read image {drawn[13]}: .* the last good checkpoint is "
        rf"{tmp_path}/run/checkpoints/step-00000001$",
        done.stderr,
        re.M,
    ), done.stderr
    assert load_model(tmp_path / "run").step == 1


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(tmp_path, config):
    common = ["--data", "digits", "--config", config, "--device", "cpu", "--out", tmp_path / "run"]
    done = torchrun(2, *common, "--batch-size", 9)
    assert done.stderr.count("batch_size must be a multiple of 2 processes") == 1
    assert not (tmp_path / "run").exists()


# Bad input ---------------------------------------------------------------------------------


def complaint(capsys, *arguments: object) -> tuple[int, str]:
    """The status of a call, and the one line that it says."""
    status = train(*arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ddpm-fast train: ")
    return status, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config: data.path is missing: name the images by --data"),
        (["--data", "nowhere"], "data: no folder of images at .*nowhere: there is nothing there"),
        (["--data", "digits", "--preset", "x"], "config: preset must be one of digits, cifar10, "),
        (["--data", "digits", "--config", "x.json"], "config: cannot read x.json: .*No such file"),
        (["--data", "digits", "--set", "steps"], "config: --set takes FIELD=VALUE; got 'steps'"),
        (["--data", "digits", "--set", "unet.width=3"], "config: unet.width is unknown"),
        (["--data", "digits", "--set", "unet.num_classes=9"], "data: digits has 10 classes"),
        (["--data", "digits", "--device", "tpu"], "device must be cpu or cuda; got 'tpu'"),
        (["--data", "digits", "--precision", "fp16", "--parallel", "fsdp"], "precision fp16 does"),
        (["--data", "digits", "--parallel", "fsdp"], "parallel fsdp takes several processes"),
        (["--data", "digits", "--batch-size", "9", "--grad-accum", "2"], "config: batch_size must"),
    ],
)
def test_what_cannot_be_run_leaves_nothing(tmp_path, capsys, arguments, message):
    status, said = complaint(capsys, "--out", tmp_path / "out", *arguments)
    assert status == 2
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used(tmp_path, config, images, capsys):
    common = ["--config", config, "--quiet", "--out", tmp_path / "out", "--data"]
    (tmp_path / "empty").mkdir()
    status, said = complaint(capsys, *common, tmp_path / "empty")
    assert status == 2
    assert "no images in" in said
    status, said = complaint(capsys, *common, images)
    assert status == 2
    assert "the images differ in size" in said
    bad = images / "a" / "00.png"
    bad.write_bytes(bad.read_bytes()[:50])
    status, said = complaint(capsys, *common, images, "--image-size", 8)
    assert status == 2
    assert f"cannot read image {bad}" in said
    assert not (tmp_path / "out").exists()
    assert train(*common, images, "--image-size", 8, "--on-bad-image", "skip") == 0
    assert "1 images could not be read and were passed over" in capsys.readouterr().err


def test_a_run_that_is_there(tmp_path, config, capsys):
    out = tmp_path / "run"
    common = ["--data", "digits", "--config", config, "--out", out, "--quiet"]
    assert train(*common) == 0
    capsys.readouterr()
    status, said = complaint(capsys, *common)
    assert status == 2
    assert "holds a run already: go on with it by --resume, or take another --out" in said
    changed = ["--resume", "--batch-size", 4, "--set", "loss.objective=vlb"]
    status, said = complaint(capsys, *common, *changed)
    assert status == 2
    assert 'changed: loss.objective: "simple" → "vlb"; batch_size: 8 → 4' in said
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 5)
    assert (status, "steps: 6 → 5 (they may only grow)" in said) == (2, True)
    with RunLock(out / "lock"):
        status, said = complaint(capsys, *common, "--resume")
    assert (status, f"in use by another process (pid {os.getpid()})" in said) == (1, True)
    (tmp_path / "file").write_text("")
    status, said = complaint(capsys, *common[:-3], "--out", tmp_path / "file")
    assert (status, "is a file; a run is kept in a folder" in said) == (2, True)
    assert load_model(out).step == 6


def test_a_checkpoint_cut_short(tmp_path, config, capsys):
    """Named, kept aside, and the last good one is gone on from, to the same bits."""
    common = ["--data", "digits", "--config", config, "--quiet", "--checkpoint-every", 2]
    assert train(*common, "--out", tmp_path / "a") == 0
    out = tmp_path / "b"
    assert train(*common, "--out", out, "--steps", 4) == 0
    newest = out / "checkpoints" / "step-00000004"
    weights = newest / "model.safetensors"
    os.truncate(weights, 1000)
    capsys.readouterr()
    assert train("--out", out, "--resume", "--steps", 6, "--quiet") == 0
    said = capsys.readouterr().err
    assert f"warning: {weights} has 1,000 bytes instead of " in said
    assert f"warning: going on from {out / 'checkpoints' / 'step-00000002'}; what is broken" in said
    assert_same_run(tmp_path / "a", out)
    assert (
        out / "checkpoints" / "broken-step-00000004" / "model.safetensors"
    ).stat().st_size == 1000


def test_a_checkpoint_of_another_config(tmp_path, config, capsys):
    out = tmp_path / "run"
    assert train("--data", "digits", "--config", config, "--quiet", "--out", out) == 0
    path = out / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    capsys.readouterr()
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert status == 2
    assert "step-00000006 is of another config than" in said
    assert said.endswith("seed: 0 → 1\n")
    path.write_text(text[: len(text) // 2])
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, "config.json: not JSON (cut short?)" in said) == (2, True)
    path.unlink()
    assert train("--out", out, "--resume", "--steps", 9, "--quiet") == 0
    assert "config.json is missing; the last checkpoint's is taken" in capsys.readouterr().err
    assert json.loads(path.read_text())["steps"] == 9


def test_other_data_than_the_run_began_with(tmp_path, config, images, capsys):
    out = tmp_path / "run"
    arguments = ["--data", images, "--config", config, "--image-size", 8, "--quiet", "--out", out]
    assert train(*arguments) == 0
    Image.new("L", (8, 8)).save(images / "a" / "new.png")
    capsys.readouterr()
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, "has 25 images; the run began with 24" in said) == (2, True)


def test_the_classes_a_run_began_with(tmp_path, config, capsys, monkeypatch):
    """A test set without the first class has the labels of the run; a class that has another name,
    or files that have, are refused on resume; the same files elsewhere are not."""
    images, out = tmp_path / "images", tmp_path / "run"
    for name in "abc":
        for split in ("images", "test")[: 1 + (name != "a")]:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((8, 8), 60).save(tmp_path / split / name / f"{i}.png")
    arguments = ["--set", f"data.path={os.path.relpath(images)}", "--config", config, "--quiet"]
    assert train(*arguments, "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["data"]["path"] == str(images)
    assert load_model(out).class_names == ["a", "b", "c"]
    opened = []

    def spy(*args, **options):
        opened.append(open_data(*args, **options))
        raise ValueError("seen")

    with monkeypatch.context() as patch:
        patch.setattr(data, "open_data", spy)
        assert main(["evaluate", str(out), "--data", str(tmp_path / "test"), "--quiet"]) == 2
    assert sorted(set(opened[0].batch(range(8))[1].tolist())) == [1, 2]
    capsys.readouterr()
    resumed = ["--out", out, "--resume", "--steps", 9]
    saved = (out / "config.json").read_text()
    (images / "b").rename(images / "bb")
    status, said = complaint(capsys, *resumed)
    assert (status, "label 1 is 'bb', it was 'b'" in said) == (2, True)
    (images / "bb").rename(images / "b")
    (images / "b" / "0.png").rename(images / "b" / "9.png")
    status, said = complaint(capsys, *resumed)
    assert (status, "files of other names than the run began with" in said) == (2, True)
    assert (out / "config.json").read_text() == saved
    (images / "b" / "9.png").rename(images / "b" / "0.png")
    images.rename(tmp_path / "moved")
    changed = ["--data", tmp_path / "moved", "--on-bad-image", "skip", "--grad-accum", 2]
    changed += ["--set", "activation_checkpointing=true", "--quiet"]
    assert train(*resumed, *changed) == 0
    state = out / "checkpoints" / "latest" / "state.json"
    old = json.loads(state.read_text())
    del old["class_names"], old["files_sha256"]
    state.write_text(json.dumps(old))
    assert load_model(out).class_names is None
    assert train("--out", out, "--resume", "--steps", 10, "--quiet") == 0


def test_resume_does_not_start_over(tmp_path, config, capsys, monkeypatch):
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    common = ["--data", "digits", "--config", config, "--quiet", "--checkpoint-every", 3]
    assert train(*common, "--out", out) == 0
    capsys.readouterr()
    there = sorted(checkpoints.iterdir())
    log = (out / "log.jsonl").read_bytes()

    def broken_call(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "disk")

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.checkpoints._fingerprint", broken_call)
        status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, "cannot read disk: Input/output error" in said) == (1, True)
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_fast.training.journal.write_bytes", broken_call)
        status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9, "--quiet")
    good = f"Input/output error (disk); the last good checkpoint is {there[-1]}\n"
    assert (status, said.endswith(good)) == (1, True)

    state = there[-1] / "state.json"
    text = state.read_text()
    state.write_text(text.replace('"format_version": 1', '"format_version": 2', 1))
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, "has format version 2; this ddpm_fast reads version 1" in said) == (1, True)
    for path in there[1:]:
        (path / "state.json").write_text(text[:100])
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, said.count("is not JSON (cut short?)")) == (1, 3)
    assert sorted(checkpoints.iterdir()) == there
    shutil.rmtree(checkpoints)
    status, said = complaint(capsys, "--out", out, "--resume", "--steps", 9)
    assert (status, "log.jsonl goes to step 6, and there is no checkpoint" in said) == (1, True)
    assert (out / "log.jsonl").read_bytes() == log


def test_two_starts_at_once(tmp_path, config, capsys):
    """Both have looked at an empty folder; the second finds what the first has done meanwhile."""
    out, images = tmp_path / "run", tiny_images()
    late, resuming = RunFolder(out), RunFolder(out)
    late.look(resume=False)
    resuming.look(resume=True)
    assert train("--data", "digits", "--config", config, "--quiet", "--out", out) == 0
    saved = RunConfig.from_json((out / "config.json").read_text())
    with pytest.raises(RunError, match="holds a run already"):
        late.begin(saved, images)
    late.release()
    digits = open_data("digits", image_size=8, channels=1)
    found = resuming.begin(saved, digits)
    resuming.release()
    assert found is not None
    assert found.step == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_disk_that_is_full(tmp_path, config, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        common = ["--data", "digits", "--config", config, "--quiet", "--out", disk / "run"]
        status, said = complaint(capsys, *common, "--checkpoint-every", 1, "--keep", 0)
        assert status == 1
        assert "No space left on device; the last good checkpoint is " in said
        assert not [p for p in (disk / "run" / "checkpoints").iterdir() if p.name.startswith(".")]
        assert f"{load_model(disk / 'run').path}\n" in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)
