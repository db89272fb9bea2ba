"""A folder belongs to one process at a time, by a lock that the system lets go."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import TypeVar

_held: set[int] = set()
_Lock = TypeVar("_Lock", bound="FileLock")


def _release_in_child() -> None:
    # A worker that outlives its parent must not hold the parent's lock.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


class InUseError(RuntimeError):
    """A folder that another process, or another thread, works in."""


class FileLock:
    """An exclusive flock of a file, which names the process that holds it.

    The kernel lets it go when the process ends, however it ends: no lock is ever stale. Child
    processes do not share it.

    Raises:
        InUseError: it is held already, by another process or in this one.
        OSError: the file cannot be made, or not be locked where it lies.
        NotImplementedError: this system has no flock.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise NotImplementedError(
                "folders are locked by flock, which this system does not have"
            ) from None
        self._flock, self._unlock, self._path = fcntl.flock, fcntl.LOCK_UN, path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 64).decode(errors="replace").strip()
            os.close(self._descriptor)
            pid = f" (pid {holder})" if holder else ""
            raise InUseError(f"{path.parent} is in use by another process{pid}") from None
        except OSError as error:
            os.close(self._descriptor)
            raise OSError(error.errno, f"cannot lock: {error.strerror}", str(path)) from error
        _held.add(self._descriptor)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def is_of_its_path(self) -> bool:
        """Whether the file that is locked is the one that others would find."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            self._flock(self._descriptor, self._unlock)
            os.close(self._descriptor)

    def __enter__(self: _Lock) -> _Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
