"""Files that are written whole or not at all, and what is left of processes that were killed."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest

from ddpm_fast.nn import checkpoint
from ddpm_fast.nn.checkpoint import write_bytes
from ddpm_fast.training.drawn_folder import DrawnFolder, Share


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_another_process_is_writing_stays(tmp_path):
    """Whoever's image it is; that of a process that is gone does not."""
    live, gone = tmp_path / ".000001.png.00ff.partial", tmp_path / ".000002.png.4711.partial"
    grids, others = tmp_path / ".grid.png.aa.partial", tmp_path / ".notes.partial"
    for path in (live, gone, grids, others):
        path.write_bytes(b"half")
    with open(live, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        DrawnFolder(tmp_path, Share(4, 2, 1, 2), "x")
        assert set(os.listdir(tmp_path)) == {live.name, others.name}
    DrawnFolder(tmp_path, Share(4, 2, 1, 2), "x")
    assert os.listdir(tmp_path) == [others.name]


def test_a_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    replace, removed = os.replace, []

    def look(source, target):
        checkpoint.remove_leftover(source)
        removed.append(not source.exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_bytes(tmp_path / "a.png", b"all ", b"of it")
    assert removed == [False]
    assert files(tmp_path) == {"a.png": b"all of it"}


@pytest.mark.parametrize("locked_by_the_other", [False, True])
def test_a_file_taken_for_a_leftover_is_written_anew(tmp_path, monkeypatch, locked_by_the_other):
    """In the moment between its making and its lock."""
    flock, calls = fcntl.flock, []

    def first_removed(file, operation):
        calls.append(file.name)
        if len(calls) == 1:
            os.unlink(file.name)
            if locked_by_the_other:
                raise BlockingIOError
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", first_removed)
    write_bytes(tmp_path / "a.png", b"whole")
    assert len(set(calls)) == 2
    assert files(tmp_path) == {"a.png": b"whole"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    write_bytes(tmp_path / "a", b"whole")
    young, old = tmp_path / ".000001.png.1.partial", tmp_path / ".000001.png.2.partial"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    DrawnFolder(tmp_path, Share(4, 2), "x")
    assert set(os.listdir(tmp_path)) == {"a", young.name}
