"""Lines outside of the package: whoever called it, and what it called."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

# Neither: ours, and what runs our generators and the operations.
_PASSED = (
    f"{Path(__file__).parent}{os.sep}",
    f"{Path(torch.__file__).parent}{os.sep}",
    contextlib.__file__,
)


def warn_caller(message: str) -> None:
    """A UserWarning at the line that led here, through generators and contexts."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def place_within(filename: str) -> str:
    """The innermost line that led here from a file of the package, of those that are not its; ""
    if there is none."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename != filename:
        if not frame.f_code.co_filename.startswith(_PASSED):
            (found,) = traceback.StackSummary.extract([(frame, frame.f_lineno)])
            return f"{found.filename}, line {found.lineno}: {found.line}"
        frame = frame.f_back
    return ""


def place_of(error: BaseException) -> str:
    """The innermost line that an error passed; "" if all were the package's and PyTorch's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_PASSED):
            return f"{frame.filename}, line {frame.lineno}: {frame.line}"
    return ""
