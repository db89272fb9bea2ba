"""Errors of memory that did not suffice, which PyTorch has many of, as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
# In messages of RuntimeErrors: those of a CPU have no class of their own
_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS's and cuDNN's
)


class DeviceMemoryError(MemoryError, torch.OutOfMemoryError):
    """A MemoryError that was PyTorch's, for those who wait for that."""


def within_memory(what: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What a function returns; ``what`` is what it makes, for the error.

    Raises:
        MemoryError: there was not enough; nothing keeps what was half made.
    """
    try:
        return function(*args, **kwargs)
    except (MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if not reason:
            raise
        kind = DeviceMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
    # Outside, where no traceback keeps what was half made
    raise kind(f"not enough memory for {what}: {reason}")


def _reason(error: MemoryError | RuntimeError) -> str:
    """In its own words, if memory is what is missing."""
    said = str(error).split("\n")[0]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return said or type(error).__name__ if known or any(word in said for word in _WORDS) else ""
