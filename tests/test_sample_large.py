"""Large jobs of ddpm-fast sample: killed, stopped, out of room, on several machines; and given
again, to the same files as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from forked_commands import Forks
from tiny_run import write_run

from ddpm_fast.cli import main
from ddpm_fast.commands import sample as command
from ddpm_fast.training.draw import Artist

pytestmark = pytest.mark.usefixtures("one_thread")

AGAIN = "once that is put right, the same command draws what is missing\n"
STOPPED = "ddpm-fast sample: interrupted; the same command again draws what is missing\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The files of an undisturbed run of so many images, in batches of four."""
    jobs = {}

    def files_of(num):
        if num not in jobs:
            out = tmp_path_factory.mktemp("whole")
            assert sample(run, out, "--num", num) == 0
            jobs[num] = files(out)
        return jobs[num]

    return files_of


def arguments(run, out, *more):
    return ["sample", str(run), "--out", str(out), "--batch-size", "4", "--quiet", *map(str, more)]


def sample(run, out, *more):
    return main(arguments(run, out, *more))


@pytest.fixture(scope="module")
def start(run, tmp_path_factory):
    """The command in a process of its own."""
    with Forks(tmp_path_factory.mktemp("said")) as forks:
        yield lambda out, *more, **others: forks.start(arguments(run, out, *more), **others)


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def number_of_files(out):
    return len(os.listdir(out)) if out.exists() else 0


# Killed -------------------------------------------------------------------------------------


def kill_again_and_again(start, out, num, *, times, processes, seed):
    """Each time after some more files."""
    moments, world = random.Random(seed), {"WORLD_SIZE": str(processes)}
    for _ in range(times):
        count = number_of_files(out) + moments.randint(1, num // (times + 3))
        started = [start(out, "--num", num, RANK=str(i), **world) for i in range(processes)]
        wait_for(lambda count=count: number_of_files(out) >= count)
        time.sleep(moments.random() / 50)
        for process in started:
            process.kill()
        assert [process.wait()[0] for process in started] == [-signal.SIGKILL] * processes


def test_killed_again_and_again(run, start, tmp_path, whole):
    out, expected = tmp_path / "out", whole(240)
    kill_again_and_again(start, out, 240, times=4, processes=1, seed=0)
    assert 0 < number_of_files(out) < len(expected)
    for name, data in files(out).items():
        assert name.endswith(".partial") or data == expected[name]
    assert sample(run, out, "--num", 240) == 0
    assert files(out) == expected


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_several_processes_killed_again_and_again(run, start, tmp_path, whole, seed):
    """Two, then three; in the end one draws what is left."""
    out, expected = tmp_path / "out", whole(480)
    kill_again_and_again(start, out, 480, times=6, processes=2, seed=seed)
    kill_again_and_again(start, out, 480, times=4, processes=3, seed=seed)
    assert number_of_files(out) < len(expected)
    assert sample(run, out, "--num", 480) == 0
    assert files(out) == expected


def test_killed_in_the_middle_of_a_write(run, start, tmp_path, whole):
    """What is half written stays behind; the next run removes it, in any number of processes."""
    code = """
        import itertools, os, signal
        fsync, calls = os.fsync, itertools.count()
        def killed(descriptor):
            if next(calls) == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)
        os.fsync = killed
    """
    assert start(tmp_path, "--num", 40, code=code).wait()[0] == -signal.SIGKILL
    left = [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert 1 <= len(left) <= 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        for rank in "021":
            patch.setenv("RANK", rank)
            assert sample(run, tmp_path, "--num", 40) == 0
    assert files(tmp_path) == whole(40)


# Several machines ---------------------------------------------------------------------------


@pytest.mark.parametrize("worlds", [(3, 1), (1, 4), (2, 5)])
def test_a_rerun_in_another_number_of_processes(run, tmp_path, whole, monkeypatch, worlds):
    """Some of the first ones go missing."""
    first, second = worlds
    for world_size, ranks in ((first, range(0, first, 2)), (second, range(second))):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for rank in ranks:
            monkeypatch.setenv("RANK", str(rank))
            assert sample(run, tmp_path, "--num", 37) == 0
        for name in ("000009.png", "grid.png"):
            if world_size == first:
                (tmp_path / name).unlink(missing_ok=True)
    assert files(tmp_path) == whole(37)


@pytest.mark.slow
def test_two_nodes_of_torchruns(run, tmp_path, whole):
    """As on two machines, each with one process, that share a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = ["-m", "ddpm_fast.cli", "--", *arguments(run, tmp_path, "--num", 200)]
    nodes = [
        subprocess.Popen(
            [*launcher, f"--node-rank={node}", *rendezvous, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for rank in (0, 1):
        assert f"process {rank} of 2: drew 100 of images 0 … 199" in said[rank]
    assert files(tmp_path) == whole(200)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank must lie in 0 … 1, for 2 processes; got 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK in the environment must be an integer; got 'o"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment must be an integer; got ''"),
        ({"WORLD_SIZE": "0"}, "for 0 processes"),
    ],
)
def test_processes_that_cannot_be(run, tmp_path, capsys, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sample(run, tmp_path / "out", "--num", 4) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Out of room --------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 13, 40])
def test_a_full_disk(run, tmp_path, capsys, monkeypatch, whole, room):
    """In the middle of a file, at first, later and in the grid; and then there is room again."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert sample(run, tmp_path, "--num", 40) == 1
    said = capsys.readouterr()
    message = f"ddpm-fast sample: cannot write to {tmp_path}: No space left on device; {AGAIN}"
    assert said == ("", message)
    assert threading.active_count() == threads
    expected = whole(40)
    assert len(files(tmp_path)) == room
    assert files(tmp_path).items() <= expected.items()
    assert sample(run, tmp_path, "--num", 40) == 0
    assert files(tmp_path) == expected


def test_a_disk_that_is_really_full(run, start, tmp_path, whole):
    """A file system of 60 kB, in a name space of its own, that is then made larger."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs a mount in a name space of its own, which root alone may make")
    code = f"""
        import ctypes, os, shutil, subprocess
        from ddpm_fast.cli import main
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        mount = ["mount", "-t", "tmpfs", "none", {str(disk)!r}, "-o"]
        subprocess.run([*mount, "size=60k"], check=True)
        command = {arguments(run, disk, "--num", 40)!r}
        print(main(command), len(os.listdir({str(disk)!r})), flush=True)
        subprocess.run([*mount, "remount,size=10m"], check=True)
        assert main(command) == 0
        shutil.copytree({str(disk)!r}, {str(kept)!r})
    """
    status, out, said = start(disk, "--num", 40, code=code).wait()
    message = f"ddpm-fast sample: cannot write to {disk}: No space left on device; {AGAIN}"
    assert (status, said) == (0, message)
    first, second, third = out.splitlines()
    status, count = map(int, first.split())
    assert status == 1
    assert 0 < count < 40
    assert re.match(r"drew \d+ of images 0 … 39", second)
    assert third.startswith("drew 0 of images")
    assert files(kept) == whole(40)
    assert files(disk) == {}


def test_a_file_that_is_damaged_in_its_middle(run, tmp_path, capsys, whole):
    sample(run, tmp_path, "--num", 8)
    path = tmp_path / "000005.png"
    data = bytearray(path.read_bytes())
    data[-30:-20] = bytes(10)
    path.write_bytes(data)
    (tmp_path / "grid.png").unlink()
    capsys.readouterr()
    assert sample(run, tmp_path, "--num", 8) == 1
    said = capsys.readouterr().err
    assert "000005.png is damaged" in said
    assert said.count("\n") == 1
    path.unlink()
    assert sample(run, tmp_path, "--num", 8) == 0
    assert files(tmp_path) == whole(8)


def test_a_folder_that_disappears(run, tmp_path, capsys, monkeypatch):
    images, out = Artist.images, tmp_path / "out"

    def vanish(self, ids):
        if 8 in ids:
            out.rename(tmp_path / "elsewhere")
        return images(self, ids)

    monkeypatch.setattr(Artist, "images", vanish)
    assert sample(run, out, "--num", 40) == 1
    message = f"ddpm-fast sample: cannot write to {out}: No such file or directory; {AGAIN}"
    assert capsys.readouterr().err == message


def test_a_folder_without_write_permission(start, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    code = """
        import ctypes
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        assert libc.capget(header, sets) == 0
        sets[0] &= ~2  # CAP_DAC_OVERRIDE: root may write anywhere
        assert libc.capset(header, sets) == 0
    """
    status, _, said = start(out, "--num", 4, code=code).wait()
    assert status == 1
    assert said == f"ddpm-fast sample: cannot write to {out}: Permission denied; {AGAIN}"


# Stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped(run, start, tmp_path, whole, number, status):
    """Twice in a row, as torchrun sends it to what the terminal has stopped already."""
    process = start(tmp_path, "--num", 240)
    wait_for(lambda: number_of_files(tmp_path) >= 20)
    process.kill(number)
    process.kill(number)
    assert process.wait() == (status, "", STOPPED)
    assert 20 <= number_of_files(tmp_path) < 240
    assert files(tmp_path).items() <= whole(240).items()  # none of them half written
    assert sample(run, tmp_path, "--num", 240) == 0
    assert files(tmp_path) == whole(240)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_again_at_once(monkeypatch, number):
    """Stops nothing more; one that comes later does, where the first was not enough."""
    now, stops = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def signals():
        with command._stopped_by_signals():
            for pause in (0, 1, 1.5, 4):
                now[0] += pause
                try:
                    signal.raise_signal(number)
                except KeyboardInterrupt as stop:
                    stops.append((pause, stop.status))

    before = [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)]
    signals()
    for other, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(other, handler)
    assert stops == [(0, 128 + number), (4, 128 + number)]


def test_signals_are_given_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ValueError, match="other"), command._stopped_by_signals():
        raise ValueError("other")
    assert [signal.getsignal(number) for number in numbers] == before
