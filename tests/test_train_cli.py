"""ddpm-fast train as a person calls it: resumed, killed, interrupted, on two processes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    CHILD,
    READS_FILES,
    assert_same_run,
    command,
    config_file,  # noqa: F401
    image_folder,  # noqa: F401
    log_of,
    torchrun,
    train,
    written,
)

from ddpm_fast import UNet
from ddpm_fast.training import data
from ddpm_fast.training.checkpoints import load_model, read_checkpoint, steps_in
from ddpm_fast.training.data import data_order
from ddpm_fast.training.pictures import read_png

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_killed(tmp_path, images):
    killed_again_and_again(tmp_path, images, kills=1, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, images):
    killed_again_and_again(tmp_path, images, kills=20, seed=1)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
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


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
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
