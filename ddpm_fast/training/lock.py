"""A run directory belongs to one process at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from .errors import RunError

_held: set[int] = set()


def _release_in_child() -> None:
    # A worker that outlives its trainer must not hold the trainer's lock.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


class RunLock:
    """An exclusive flock of a file, which names the process that holds it.

    The kernel lets it go when the process ends, however it ends: no lock is ever stale. Child
    processes do not share it.

    Raises:
        RunError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise RunError("runs are locked by flock, which this system does not have") from None
        self._flock, self._unlock = fcntl.flock, fcntl.LOCK_UN
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 64).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise RunError(
                f"{path.parent} is in use by another process"
                f"{f' (pid {holder})' if holder else ''}: wait for it, or take another --out"
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise RunError(f"cannot lock {path}: {error.strerror}") from error
        _held.add(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            self._flock(self._descriptor, self._unlock)
            os.close(self._descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
