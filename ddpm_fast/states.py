"""Saved states: what a computation that was interrupted goes on from in another process.

A state is a folder. state.json holds the kind of the state, its description, the name, size and
SHA-256 of the file of its tensors, and last a SHA-256 of all this; state-00000003.safetensors, the
third that was saved there, holds the tensors. The tensors are written under a name that nothing
leads to, synced, then state.json is replaced, then the file before is removed: whatever fails or
kills the process, the folder holds the state before or the new one, whole. While both are there it
takes the room of two. Needs safetensors, which is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from .locking import FileLock
from .nn.checkpoint import read_json, sync_folder, write_bytes

FORMAT, FORMAT_VERSION = "ddpm_fast", 1
STATE, LOCK = "state.json", "state.lock"
State = tuple[dict[str, Any], dict[str, Tensor]]  # description, tensors
_TENSORS = re.compile(r"state-(\d{8,})\.safetensors")
_OURS = re.compile(r"state\.json|state\.lock|state-\d{8,}\.safetensors|\.state[.-].*\.partial")


def has_state(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a state, whole or not, of whatever kind."""
    return (Path(folder) / STATE).is_file()


def read_state(folder: str | os.PathLike[str], kind: str) -> State | None:
    """The description and the tensors, on the CPU, of the state in a folder; None where there is no
    folder, or nothing was saved in it yet.

    Raises:
        ValueError: a state of another kind or of a later version; a file that was cut short, edited
            or is missing, by name; a folder that holds something else.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    while True:
        named = _named(folder, kind)
        if named is None:
            return None
        try:
            return named["description"], _tensors(folder, named["tensors"])
        except ValueError:
            if _named(folder, kind) == named:
                raise
            # else saved anew in between, and the file that was named is gone


def write_state(
    folder: str | os.PathLike[str],
    kind: str,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Saves a state in a folder, in place of the one of its kind that is there.

    Args:
        folder: made where it does not exist.
        kind: of the state: one of another kind is never overwritten.
        description: what JSON can hold.
        tensors: by name; of any dtype that safetensors knows, on any device.

    Raises:
        ValueError: the folder holds something else.
        InUseError: another process, or another call in this one, is at work in it.
        OSError: it cannot be written; the state that was there is as it was.
        ImportError: safetensors is not installed.
    """
    with StateFolder(folder, kind) as states:
        states.write(description, tensors)


class StateFolder:
    """A folder of states of one kind, which belongs to this object while it is entered.

    Raises:
        ValueError: it holds something else.
        InUseError: another process, or another call in this one, is at work in it.
        OSError: it cannot be made, or not be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str) -> None:
        self.path, self.kind = Path(folder), kind
        self._lock: FileLock | None = None

    def __enter__(self) -> StateFolder:
        _safetensors()
        _named(self.path, self.kind)  # before anything is written to a folder of something else
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
        self._lock = FileLock(self.path / LOCK)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> State | None:
        """:func:`read_state`."""
        return read_state(self.path, self.kind)

    def write(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """:func:`write_state`."""
        if self._lock is None or not self._lock.is_of_its_path():
            raise FileNotFoundError(f"{self.path} was removed, or replaced, while it was in use")
        before = _named(self.path, self.kind)
        count = 1 if before is None else _count(before) + 1
        data = _as_safetensors(tensors)
        name = f"state-{count:08d}.safetensors"
        named = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "description": dict(description),
            "tensors": {"file": name, "bytes": len(data), "sha256": _sha256(data)},
        }
        named = json.loads(json.dumps(named))  # tuples as JSON has them
        text = json.dumps({**named, "sha256": _digest(named)}, indent=2) + "\n"
        try:
            write_bytes(self.path / name, data)
            sync_folder(self.path)
            write_bytes(self.path / STATE, text.encode())
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                if _named(self.path, self.kind) == before:
                    (self.path / name).unlink(missing_ok=True)
            raise
        sync_folder(self.path)
        self._remove_others(name)

    def _remove_others(self, name: str) -> None:
        """What is no part of the state: that before, and what a process that was killed left."""
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in (STATE, LOCK, name):
                with contextlib.suppress(OSError):  # it takes room, nothing else
                    path.unlink()


def _named(folder: Path, kind: str) -> dict[str, Any] | None:
    """What state.json says, but for its own digest; None where nothing was saved yet."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"a state is a directory; {folder} is a file")
    path = folder / STATE
    try:
        found = read_json(path)
    except FileNotFoundError:
        names = os.listdir(folder) if folder.is_dir() else []
        others = [name for name in names if not _OURS.fullmatch(name)]
        if others:
            raise ValueError(
                f"{folder} holds no state but something else ({min(others)}): take another folder"
            ) from None
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "kind" not in found:
        raise ValueError(f"{path} does not describe a state of ddpm_fast's: take another folder")
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this ddpm_fast reads version {FORMAT_VERSION}"
        )
    if found["kind"] != kind:
        raise ValueError(f"{path} is a state of kind {found['kind']!r}, not {kind!r}")
    if found.pop("sha256", None) != _digest(found):
        raise ValueError(f"{path} was edited, or is damaged: its SHA-256 is not the one it names")
    named = found.get("tensors")
    if not (
        isinstance(found.get("description"), dict)
        and isinstance(named, dict)
        and isinstance(named.get("file"), str)
        and _TENSORS.fullmatch(named["file"])
        and type(named.get("bytes")) is int
        and isinstance(named.get("sha256"), str)
    ):
        raise ValueError(f"{path} describes no state, or names no file of its tensors")
    return found


def _count(named: Mapping[str, Any]) -> int:
    match = _TENSORS.fullmatch(named["tensors"]["file"])
    assert match is not None
    return int(match[1])


def _tensors(folder: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the bytes that were verified."""
    safetensors = _safetensors()
    path = folder / expected["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, which {STATE} names") from None
    if len(data) != expected["bytes"]:
        raise ValueError(
            f"{path} has {len(data):,} bytes instead of {expected['bytes']:,}: it was cut short"
        )
    if _sha256(data) != expected["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not {STATE}'s")
    try:
        found: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return found


def _as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    save = _safetensors().torch.save
    storages: set[int] = set()
    dense = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # Two views of one memory would not be taken
        dense[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        data: bytes = save(dense, metadata={"format": "pt"})
    except KeyError as error:
        raise TypeError(f"a state cannot hold a tensor of {error.args[0]}") from None
    return data


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving a state needs safetensors: pip install safetensors") from error
    return safetensors


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(named: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(named, sort_keys=True).encode())
