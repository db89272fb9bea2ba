"""The commands of ``ddpm-fast``: each module has ``add_parser`` and ``run``, which gives the exit
status. What takes long to import is imported in ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys


def positive(text: str) -> int:
    """An argument's value, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def non_negative(text: str) -> int:
    """An argument's value, at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def seed(text: str) -> int:
    """An argument's value, a seed that every generator takes."""
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError("must lie in 0 … 2^32 - 1")
    return value


def missing_package(command: str, extra: str, modules: tuple[str, ...]) -> bool:
    """Whether one of ``modules`` cannot be imported; says then what to install."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(
                f"ddpm-fast {command} needs {error.name}: pip install 'ddpm_fast[{extra}]'",
                file=sys.stderr,
            )
            return True
    return False
