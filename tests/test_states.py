"""Saved states: the one before or the new one, whole, whatever happens; verified when read."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ddpm_fast import states
from ddpm_fast.locking import InUseError
from ddpm_fast.states import StateFolder, has_state, read_state, write_state

DESCRIPTION = {"row": 3, "third": 1 / 3, "names": ["a", "ü"], "nothing": None}


def tensors(number: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    x = torch.randn(2, 3, 4, generator=random)
    x[0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return {
        "x": x,
        "bf16": x.bfloat16(),
        "f16": x.half(),
        "f64": x.double(),
        "ids": torch.tensor([-(1 << 63), number, (1 << 63) - 1]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "number": torch.tensor(number),
        "empty": torch.zeros(0, 3),
        "strided": x[:, ::2],
        "again": x,
        "ünï/code": x[1],
    }


def assert_state(folder: Path, number: int) -> None:
    found = read_state(folder, "test")
    assert found is not None
    assert found[0] == {**DESCRIPTION, "number": number}
    expected = tensors(number)
    assert found[1].keys() == expected.keys()
    for name, tensor in found[1].items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected[name])]
        assert torch.equal(*bits), name


def save(folder: Path, number: int) -> None:
    write_state(folder, "test", {**DESCRIPTION, "number": number}, tensors(number))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "made" / "with its parents"
    assert not has_state(folder)
    assert read_state(folder, "test") is None
    assert not folder.exists()
    for number in (1, 2, 3):
        save(folder, number)
        assert has_state(folder)
        assert_state(folder, number)
        found = read_state(folder, "test")[1]
        found["x"].add_(1)  # they are the caller's own
        assert names(folder) == [f"state-0000000{number}.safetensors", "state.json", "state.lock"]
    write_state(folder, "test", {}, {})
    assert read_state(folder, "test") == ({}, {})


def test_equal_states_are_equal_files(tmp_path):
    for name in "ab":
        save(tmp_path / name, 7)
    for file in ("state.json", "state-00000001.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "ab"}) == 1


# Killed, or out of room, at any operation ------------------------------------------------------

OPERATIONS = [(os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (os, "open"),
              (builtins, "open")]  # fmt: skip


def count_to(number: int, patch: pytest.MonkeyPatch, what, last: int = 10_000) -> list[str]:
    """Does ``what`` in place of the file operation of that number, and of those up to another."""
    done: list[str] = []

    def before(call, name):
        def counted(*args, **kwargs):
            done.append(name)
            if number < len(done) <= last + 1:
                what()
            return call(*args, **kwargs)

        return counted

    for module, name in OPERATIONS:
        patch.setattr(module, name, before(getattr(module, name), name))
    return done


@pytest.mark.parametrize("earlier", [0, 2])
def test_killed_at_any_operation(tmp_path, monkeypatch, earlier):
    for operation in range(60):
        folder = tmp_path / str(operation)
        for number in range(1, earlier + 1):
            save(folder, number)
        child = os.fork()
        if child == 0:
            try:
                count_to(operation, monkeypatch, lambda: os._exit(9))
                save(folder, 3)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = read_state(folder, "test")
        assert (found is None) <= (earlier == 0)
        if found is not None:
            assert found[0]["number"] in (earlier, 3)
            assert_state(folder, found[0]["number"])
        if status == 0:
            assert found[0]["number"] == 3
            break
        save(folder, 4)  # and it goes on, and clears up
        assert_state(folder, 4)
        assert len(names(folder)) == 3
    assert status == 0
    assert operation > 10


@pytest.mark.parametrize("more", [0, 10_000])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failing_at_any_operation(tmp_path, error, more):
    """Once, or in all that follows; then, in the same process, it is tried again."""

    def fail():
        raise error

    for operation in range(60):
        folder = tmp_path / str(operation)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            done = count_to(operation, patch, fail, operation + more)
            try:
                save(folder, 2)
            except type(error):
                failed = True
            else:
                failed = False
        assert read_state(folder, "test")[0]["number"] in ((1, 2) if failed else (2,))
        assert_state(folder, read_state(folder, "test")[0]["number"])
        save(folder, 3)
        assert_state(folder, 3)
        assert len(names(folder)) == 3
        if len(done) <= operation:
            break
    assert not failed
    assert operation > 10


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_disk_full(tmp_path, monkeypatch, room):
    """What was there stays, and nothing of the attempt is left."""
    save(tmp_path, 1)
    write, left = states.write_bytes, room

    def fills_up(path, *parts):
        nonlocal left
        left -= sum(map(len, parts))
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *parts)

    monkeypatch.setattr(states, "write_bytes", fills_up)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["state-00000001.safetensors", "state.json", "state.lock"]
    assert_state(tmp_path, 1)


# Files of others, and damaged ones -------------------------------------------------------------


def changed_json(folder: Path, **changes: object) -> None:
    named = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**named, **changes}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TENSORS = "state-00000001.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "state.json").write_text(""), r"state\.json is not JSON \(cut short\?\)"),
        (lambda f: (f / "state.json").write_bytes(b"\xff\xfe{}"), r"state\.json is not JSON"),
        (lambda f: (f / "state.json").write_text("[]"), r"state\.json does not describe a state"),
        (lambda f: (f / "state.json").write_text('{"format": "pt"}'), "does not describe a state"),
        (lambda f: changed_json(f, format_version=2), "format version 2; .* reads version 1"),
        (lambda f: changed_json(f, kind="session"), "is a state of kind 'session', not 'test'"),
        (lambda f: changed_json(f, description={"row": 4}), r"state\.json was edited"),
        (lambda f: changed_json(f, sha256="0"), r"state\.json was edited"),
        (lambda f: changed_json(f, tensors={}), r"state\.json was edited"),
        (lambda f: (f / TENSORS).unlink(), r"state-00000001\.safetensors is missing"),
        (lambda f: (f / TENSORS).write_bytes(b""), r"001\.safetensors has 0 bytes .* cut short"),
        (lambda f: os.truncate(f / TENSORS, 70), r"safetensors has 70 bytes instead of .* short"),
        (lambda f: flip(f / TENSORS), r"state-00000001\.safetensors is damaged"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    save(tmp_path, 1)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path, "test")


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model.safetensors", ".hidden"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    for call in (save, lambda f, _: read_state(f, "test")):
        with pytest.raises(ValueError, match=rf"holds no state but something else \({name}\)"):
            call(tmp_path, 1)
    assert names(tmp_path) == [name]


def test_a_state_of_another_kind_is_not_overwritten(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="is a state of kind 'test', not 'session'"):
        write_state(tmp_path, "session", {}, {})
    assert_state(tmp_path, 1)


def test_what_others_keep_beside_a_state_stays(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (save, lambda f, _: read_state(f, "test")):
        with pytest.raises(NotADirectoryError, match=r"a state is a directory; .*file is a file"):
            call(tmp_path / "file", 1)


def test_what_cannot_be_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(tmp_path, "test", {"function": print}, {})
    with pytest.raises(TypeError, match=r"cannot hold a tensor of torch\.complex128"):
        write_state(tmp_path, "test", {}, {"x": torch.zeros(2, dtype=torch.complex128)})
    assert_state(tmp_path, 1)


def test_without_safetensors(tmp_path, monkeypatch):
    save(tmp_path / "there", 1)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save, lambda f, _: StateFolder(f, "test").__enter__()):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tmp_path / "new", 1)
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_state(tmp_path / "there", "test")
    assert not (tmp_path / "new").exists()


# Several at once -------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path):
    with StateFolder(tmp_path, "test") as held:
        held.write({**DESCRIPTION, "number": 1}, tensors(1))
        with pytest.raises(InUseError, match=r"is in use by another call in this process$"):
            save(tmp_path, 2)
        assert_state(tmp_path, 1)  # reading needs no turn
        held.write({**DESCRIPTION, "number": 3}, tensors(3))
    assert_state(tmp_path, 3)
    save(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="was removed, or replaced, while it was in use"):
        held.write({}, {})


def test_a_folder_that_is_removed_while_it_is_held(tmp_path):
    folder = tmp_path / "states"
    with StateFolder(folder, "test") as held:
        held.write({}, {})
        os.rename(folder, tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match="was removed, or replaced"):
            held.write({}, {})
        save(folder, 1)  # somebody else's by now
        with pytest.raises(FileNotFoundError, match="was removed, or replaced"):
            held.write({}, {})
    assert_state(folder, 1)


def test_saved_anew_while_it_is_read(tmp_path, monkeypatch):
    """The file that was named is gone then."""
    save(tmp_path, 1)
    read = states._tensors

    def late(folder, expected):
        monkeypatch.undo()
        save(tmp_path, 2)
        return read(folder, expected)

    monkeypatch.setattr(states, "_tensors", late)
    assert_state(tmp_path, 2)


WRITES_ON = """
import sys
import test_states
number = 10
while True:
    test_states.save(test_states.Path(sys.argv[1]), number := number + 1)
"""


def test_reading_while_it_is_written_and_killing_the_writer(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    writer = subprocess.Popen([sys.executable, "-c", WRITES_ON, str(tmp_path)], env=environment)
    try:
        seen: set[int] = set()
        while len(seen) < 40:
            assert writer.poll() is None
            found = read_state(tmp_path, "test")
            if found is not None:
                number = found[0]["number"]
                assert found[1]["number"] == number
                seen.add(number)
    finally:
        writer.kill()
        writer.wait()
    assert_state(tmp_path, read_state(tmp_path, "test")[0]["number"])
    save(tmp_path, 5)
    assert len(names(tmp_path)) == 3


def test_threads_take_turns_or_are_told(tmp_path):
    refused, saved = [], []

    def work(number):
        for _ in range(20):
            try:
                save(tmp_path, number)
                saved.append(number)
            except InUseError:
                refused.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(saved) + len(refused) == 60
    assert saved
    assert_state(tmp_path, read_state(tmp_path, "test")[0]["number"])
