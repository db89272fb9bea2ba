"""Damage to files and folders, and what a reader of them may answer: a whole result, or an error
that names the file. The same damage at every run; FUZZ_ROUNDS=100 makes a hundred times as much.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))
SECONDS = 60  # of the processor, however busy it is: a reader that takes them does not end
# Addresses that it may take beside what the process has: for a damaged length pillow asks for up to
# 4 GiB, of which it touches nothing.
MEMORY = 6 << 30
Reader = Callable[[Path], Any]

_NUMBERS = [0, -1, 1, 7, 2**31, 2**62, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320]
_STRINGS = ["", "x", "é\ud800", "\0", "../../etc/passwd", "1", "NaN", "True", "a" * 300]
_OTHERS = [None, True, False, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], float("nan"), float("inf")]
_TEXTS = [
    b"",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 6000,
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"{} {}",
    b'{"a": 1e999999}',
]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut short, a bit or some bytes changed, taken out or put in."""
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.3:  # where a header is
        at = min(at, rng.randrange(200))
    count = rng.choice([1, 1, 2, 8, 100])
    way = rng.randrange(6)
    if way == 0 or not data:
        return data[:at]
    if way == 1:
        changed = bytearray(data)
        changed[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 2:
        return data[:at] + rng.randbytes(count) + data[at + count :]
    if way == 3:
        return data[:at] + rng.choice([b"\0", b"\xff"]) * count + data[at + count :]
    if way == 4:
        return data[:at] + data[at + count :]
    return data[:at] + rng.randbytes(count) + data[at:]


def damaged_json(values: Any, rng: random.Random) -> bytes:
    """A value somewhere replaced, taken out or put in; or text that is no such JSON."""
    if rng.random() < 0.1:
        return rng.choice(_TEXTS)
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key = rng.choice(list(_places(values)) or [(None, None)])
        junk = copy.deepcopy(rng.choice(rng.choice([_NUMBERS, _STRINGS, _OTHERS])))
        way = rng.randrange(5)
        if holder is None:
            values = junk
        elif way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice(["extra", "", "step", "é", "config"])] = junk
        elif way == 2 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice([-holder[key], holder[key] * 10**9, str(holder[key])])
        else:
            holder[key] = junk
    return json.dumps(values).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(values, (dict, list)):
        return
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield values, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file in one way, and says in which."""
    data = path.read_bytes()
    if rng.random() < 0.06:
        path.unlink()
        way = rng.choice(["removed", "a folder", "a link to nothing", "a link to itself"])
        if way == "a folder":
            path.mkdir()
        elif way != "removed":
            path.symlink_to(path.name if way == "a link to itself" else "nothing")
        return way
    if path.suffix == ".json" and rng.random() < 0.8:
        changed = damaged_json(json.loads(data), rng)
    elif path.suffix == ".safetensors" and rng.random() < 0.4:
        changed = _damaged_header(data, rng)
    else:
        changed = damaged_bytes(data, rng)
    path.write_bytes(changed)
    return f"{len(data)} → {len(changed)} bytes: {changed[:300]!r}"


def _damaged_header(data: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file, as JSON."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = damaged_json(json.loads(data[8:end]), rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


@contextmanager
def bounded() -> Iterator[None]:
    """With a limit on the memory that is taken, and on the time."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _too_long(*_: Any) -> None:
    raise AssertionError(f"a reader took more than {SECONDS} s of the processor")


def check_answer(read: Reader, path: Path, what: str, named: str) -> Any:
    """A reader's result; None for an error, which must be one of the kinds and have the name."""
    try:
        with bounded():
            return read(path)
    except Exception as error:
        allowed = isinstance(error, (ValueError, TypeError, OSError))
        if not allowed or named not in str(error):
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        return None


def fuzz(
    folder: Path,
    scratch: Path,
    read: Reader,
    rounds: int,
    files: list[str] | None = None,
    check: Callable[[Any, str], None] | None = None,
    seed: int = 0,
) -> None:
    """Reads copies of a folder, a file of each damaged.

    Args:
        read: of the folder's copy.
        files: those that are damaged; all if None.
        check: of a result, and the file that was damaged.
    """  # fmt: skip
    names = files or sorted(p.name for p in folder.iterdir() if p.is_file() and not p.is_symlink())
    for i in range(rounds * ROUNDS):
        rng = random.Random(f"{seed} {i}")
        target = scratch / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, symlinks=True)
        name = rng.choice(names)
        what = f"round {i}, {name}: {damage(target / name, rng)}"
        found = check_answer(read, target, what, "damaged")
        if found is not None and check is not None:
            try:
                check(found, name)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
