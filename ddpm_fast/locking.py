"""A folder belongs to one process at a time, by a lock that the system lets go."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import TypeVar

_Lock = TypeVar("_Lock", bound="FileLock")


class InUseError(RuntimeError):
    """A folder that another process works in, or another call in this one."""


class FileLock:
    """An exclusive flock of a file, which names the process that holds it.

    The kernel lets it go when the process ends, however it ends: no lock is ever stale. Child
    processes do not share it. An object that is lost lets it go, too.

    Raises:
        InUseError: it is held already, by another process or in this one; by which.
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
        # Not a number, which an interrupt could lose
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = (self._file.read(64) or b"").decode(errors="replace").strip()
            by = f"process (pid {holder})" if holder else "process"
            if self._is_ours():
                by = "call in this process"
            self._file.close()
            raise InUseError(f"{path.parent} is in use by another {by}") from None
        except OSError as error:
            self._file.close()
            raise OSError(error.errno, f"cannot lock: {error.strerror}", str(path)) from error
        _held.add(self)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n".encode())

    def is_of_its_path(self) -> bool:
        """Whether the file that is locked is the one that others would find."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _is_ours(self) -> bool:
        """Whether this process holds it: the number in the file may be one of another machine."""
        file = os.fstat(self._file.fileno())
        # Other threads take and release locks meanwhile
        with contextlib.suppress(RuntimeError):
            for lock in _held:
                with contextlib.suppress(OSError, ValueError):
                    if os.path.samestat(file, os.fstat(lock._file.fileno())):
                        return True
        return False

    def release(self) -> None:
        if not self._file.closed:
            self._flock(self._file, self._unlock)
            self._file.close()

    def __enter__(self: _Lock) -> _Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A worker that outlives its parent must not hold the parent's lock.
    for lock in _held:
        with contextlib.suppress(OSError):
            lock._file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
