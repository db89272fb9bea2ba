"""A run directory belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path

from ..locking import FileLock, InUseError
from .errors import RunError


class RunLock(FileLock):
    """The lock of a run.

    Raises:
        RunError: another process holds it, or there can be none.
    """

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except InUseError as error:
            raise RunError(f"{error}: wait for it, or take another --out") from None
        except NotImplementedError as error:
            raise RunError(str(error)) from None
