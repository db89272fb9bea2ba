"""The command ``ddpm-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import convert, demo, evaluate, info, sample, serve, train

COMMANDS = (info, demo, train, sample, evaluate, serve, convert)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="ddpm-fast", description="Fused kernels for denoising diffusion models."
    )
    parser.add_argument("--version", action="version", version=f"ddpm_fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
