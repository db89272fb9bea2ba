"""ddpm-fast info: what runs here."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__
from ..backends import backends


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info", help="which backends run here, and why the others do not"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    print(f"ddpm_fast {__version__}")
    print(backends())
    return 0
