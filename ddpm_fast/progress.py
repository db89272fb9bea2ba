"""Progress bars, by tqdm where they are wanted."""

from __future__ import annotations

import contextlib
from typing import Any


class _NoBar:
    def update(self, count: int = 1) -> None:
        pass


def bar(
    wanted: bool, total: int | None, what: str, unit: str = "image"
) -> contextlib.AbstractContextManager[Any]:
    """A bar on stderr with an ``update(count)``, or one that shows nothing.

    Raises:
        ImportError: it is wanted and tqdm is not installed.
    """
    if not wanted:
        return contextlib.nullcontext(_NoBar())
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install tqdm") from error
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5)
