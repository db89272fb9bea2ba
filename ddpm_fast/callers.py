"""Warnings at the line outside of the package that led here, through generators and contexts."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# Of files whose lines are not the caller's: ours, and what runs our generators.
_PASSED = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__)


def warn_caller(message: str) -> None:
    """A UserWarning."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
