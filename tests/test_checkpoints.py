"""Checkpoints: whole or not there, whatever happens while they are written; verified when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.training import checkpoints
from ddpm_fast.training.checkpoints import (
    CheckpointError,
    Snapshot,
    load_model,
    newest_whole,
    read_checkpoint,
    remove_leftovers,
    steps_in,
    verify,
    write_checkpoint,
)
from ddpm_fast.training.config import DataConfig, RunConfig

CONFIG = RunConfig(
    DataConfig("digits"),
    UNetConfig(
        image_size=8, in_channels=1, channels=(8,), num_res_blocks=1, attention_resolutions=(),
        norm_groups=4,
    ),
    ema_rates=(0.9, 0.99),
)  # fmt: skip


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    model = {
        name: torch.randn_like(value) for name, value in UNet(CONFIG.unet).state_dict().items()
    }
    averages = {r: {n: r * v for n, v in model.items()} for r in CONFIG.ema_rates}
    optimizer = {f"exp_avg/{name}": -value for name, value in model.items()}
    optimizer |= {"loss/samples_seen": torch.tensor(step)}
    return Snapshot(CONFIG, step, 128 * step, model, averages, optimizer, {"losses": [0.1, 1 / 3]})


def assert_equal(found: Snapshot, expected: Snapshot) -> None:
    assert (found.config, found.step, found.samples) == (CONFIG, expected.step, expected.samples)
    assert found.state == expected.state
    for a, b in (
        (found.model, expected.model),
        (found.optimizer, expected.optimizer),
        *((found.averages[r], expected.averages[r]) for r in CONFIG.ema_rates),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_written_is_read(tmp_path):
    path = write_checkpoint(tmp_path, snapshot(200))
    assert path == tmp_path / "step-00000200"
    assert sorted(os.listdir(path)) == sorted([*checkpoints.FILES, checkpoints.STATE])
    assert len(os.listdir(path)) == 5
    assert_equal(read_checkpoint(path), snapshot(200))
    assert os.listdir(tmp_path).count("latest") == 1
    assert os.readlink(tmp_path / "latest") == "step-00000200"


def test_equal_states_are_equal_files(tmp_path):
    for i in range(4):
        write_checkpoint(tmp_path / str(i), snapshot(3))
    for file in os.listdir(tmp_path / "0" / "latest"):
        assert len({(tmp_path / str(i) / "latest" / file).read_bytes() for i in range(4)}) == 1


def test_only_the_last_are_kept(tmp_path):
    for step in (0, 10, 20, 30):
        write_checkpoint(tmp_path, snapshot(step), keep=2)
    assert [step for step, _ in steps_in(tmp_path)] == [20, 30]
    write_checkpoint(tmp_path, snapshot(40), keep=0)
    assert [step for step, _ in steps_in(tmp_path)] == [20, 30, 40]
    assert sorted(os.listdir(tmp_path)) == [
        "latest", "step-00000020", "step-00000030", "step-00000040",
    ]  # fmt: skip


FILE_OPERATIONS = ((os, "replace"), (os, "rename"), (os, "symlink"), (os, "fsync"), (os, "mkdir"),
                   (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"))  # fmt: skip


def dies_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before its operation of that number, without a word, as by kill -9."""
    count = 0

    def before(call):
        def counted(*args, **kwargs):
            nonlocal count
            if count == operation:
                os._exit(9)
            count += 1
            return call(*args, **kwargs)

        return counted

    for module, name in FILE_OPERATIONS:
        monkeypatch.setattr(module, name, before(getattr(module, name)))


def test_killed_at_any_operation(tmp_path, monkeypatch):
    """Of a process that writes its third checkpoint and removes its first."""
    third, survived = snapshot(3), False
    for operation in range(100):
        folder = tmp_path / str(operation)
        for step in (1, 2):
            write_checkpoint(folder, snapshot(step))
        child = os.fork()
        if child == 0:
            try:
                dies_at(operation, monkeypatch)
                write_checkpoint(folder, third, keep=2)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        latest = (folder / "latest").resolve()
        assert verify(latest)["step"] in (2, 3)
        newest, broken = newest_whole(folder)
        assert newest is not None
        assert not broken
        assert verify(newest)["step"] >= verify(latest)["step"]
        for _, path in steps_in(folder):
            verify(path)
        remove_leftovers(folder)
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        write_checkpoint(folder, snapshot(4), keep=2)
        assert verify((folder / "latest").resolve())["step"] == 4
        if os.waitstatus_to_exitcode(status) == 0:
            survived = True
            break
    assert survived
    assert operation > 15


@pytest.mark.parametrize("after", [0, 3000, 20_000])
def test_disk_full(tmp_path, monkeypatch, after):
    """The error reaches the caller, and nothing of the attempt is left."""
    write_checkpoint(tmp_path, snapshot(1))
    room = after

    def write(path, *parts):
        nonlocal room
        size = sum(map(len, parts))
        path.write_bytes(b"".join(map(bytes, parts))[:room])
        if size > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= size

    monkeypatch.setattr(checkpoints.weights, "write_bytes", write)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert_equal(read_checkpoint(tmp_path / "latest"), snapshot(1))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "changed"])
@pytest.mark.parametrize("file", [*checkpoints.FILES, checkpoints.STATE])
def test_a_damaged_file_is_named(tmp_path, file, how):
    for step in (1, 2):
        write_checkpoint(tmp_path, snapshot(step))
    bad = tmp_path / "step-00000002"
    damage(bad / file, how)
    if (file, how) == (checkpoints.STATE, "changed"):  # a digit of a digest: of which file?
        with pytest.raises(CheckpointError):
            verify(bad)
    else:
        with pytest.raises(CheckpointError, match=f"{file}.* (is|has)|holds a model"):
            verify(bad)
    newest, broken = newest_whole(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert list(broken) == [bad]


def test_load_model_checks_what_it_reads(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", snapshot(step))
    damage(tmp_path / "checkpoints" / "step-00000002" / "ema.safetensors", "cut")
    with pytest.raises(
        CheckpointError, match=r"cut short; the last good checkpoint is .*step-00000001"
    ):
        load_model(tmp_path)
    load_model(tmp_path, ema=None)  # the weights themselves are whole


def test_load_model(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", snapshot(step))
    folder = tmp_path / "checkpoints"
    for path, step in (
        (tmp_path, 2),
        (folder, 2),
        (folder / "latest", 2),
        (folder / "step-00000001", 1),
    ):
        loaded = load_model(path)
        assert (loaded.step, loaded.config) == (step, CONFIG)
        assert loaded.path == folder / f"step-{step:08d}"
        assert not loaded.model.training
        for ema, factor in (("first", 0.9), (0.9, 0.9), (0.99, 0.99), (None, 1.0)):
            state = load_model(path, ema).model.state_dict()
            expected = snapshot(step).model
            assert all(torch.equal(state[name], factor * expected[name]) for name in expected)
    raw = UNet.from_pretrained(folder / "latest").state_dict()
    assert all(torch.equal(raw[name], value) for name, value in snapshot(2).model.items())


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing there"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="it is a file"):
        load_model(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no checkpoint of a run: state\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has not written one yet"):
        load_model(tmp_path / "run")
    UNet(CONFIG.unet).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="a model without its noise schedule"):
        load_model(tmp_path / "model")
    path = write_checkpoint(tmp_path / "c", snapshot(1))
    with pytest.raises(ValueError, match=r"ema must be one of \[0.9, 0.99\], or None; got 0.5"):
        load_model(path, 0.5)


def test_another_format_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, snapshot(1))
    state = json.loads((path / "state.json").read_text())
    for change, message in (
        ({"format": "another"}, "does not describe a checkpoint"),
        ({"format_version": 2}, "format version 2; this ddpm_fast reads version 1"),
        ({"config": {"data": {"path": 3}}}, "data.path must be a string"),
        ({"files": {}}, "does not list"),
    ):
        (path / "state.json").write_text(json.dumps({**state, **change}))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_the_checkpoint_just_written_stays(tmp_path):
    """Whatever higher numbers lie beside it; and so does what `latest` names."""
    for step in (30, 40, 50):
        write_checkpoint(tmp_path, snapshot(step))
    path = write_checkpoint(tmp_path, snapshot(10), keep=2)
    assert verify(path)["step"] == 10
    assert [step for step, _ in steps_in(tmp_path)] == [10, 40, 50]
    assert os.readlink(tmp_path / "latest") == path.name


@pytest.mark.parametrize("where", ["state", "config"])
def test_a_later_format_is_no_damage(tmp_path, where):
    write_checkpoint(tmp_path, snapshot(1))
    path = write_checkpoint(tmp_path, snapshot(2)) / checkpoints.STATE
    state = json.loads(path.read_text())
    (state if where == "state" else state["config"])["format_version"] = 2
    path.write_text(json.dumps(state))
    with pytest.raises(checkpoints.NewerCheckpointError, match="reads version 1"):
        newest_whole(tmp_path)
    with pytest.raises(checkpoints.NewerCheckpointError, match=r"checkpoint is .*step-00000001"):
        load_model(tmp_path / "latest")


def test_class_names_are_loaded(tmp_path):
    """Those that are no UTF-8 as well; None of a checkpoint that has none."""
    assert load_model(write_checkpoint(tmp_path, snapshot(1))).class_names is None
    named = snapshot(2)
    named.state["class_names"] = ["ä", os.fsdecode(b"\xff")]
    assert load_model(write_checkpoint(tmp_path, named)).class_names == named.state["class_names"]
