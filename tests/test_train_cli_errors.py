"""ddpm-fast train misused, and on what is broken: what it says, and what it leaves as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess

import pytest
from PIL import Image
from training_runs import (
    assert_same_run,
    config_file,  # noqa: F401
    image_folder,  # noqa: F401
    tiny_images,
    train,
)

from ddpm_fast.cli import main
from ddpm_fast.training import data
from ddpm_fast.training.checkpoints import load_model
from ddpm_fast.training.config import RunConfig
from ddpm_fast.training.data import open_data
from ddpm_fast.training.errors import RunError
from ddpm_fast.training.lock import RunLock
from ddpm_fast.training.runs import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert (status, "in use by another call in this process: wait for it" in said) == (1, True)
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
