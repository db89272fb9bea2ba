"""The command ``ddpm-fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .backends import backends


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="ddpm-fast", description="Fused kernels for denoising diffusion models."
    )
    parser.add_argument("--version", action="version", version=f"ddpm_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="which backends run here, and why the others do not")

    demo = commands.add_parser("demo", help="train on handwritten digits and draw some")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the results (%(default)s)"
    )
    demo.add_argument("--train-steps", type=_positive, help="fewer: a quick look, worse digits")
    demo.add_argument("--seed", type=_seed, default=0, help="0 … 2^32 - 1 (%(default)s)")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")

    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info()
    return _demo(arguments.out, arguments.train_steps, arguments.seed, not arguments.quiet)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError("must lie in 0 … 2^32 - 1")
    return value


def _info() -> int:
    print(f"ddpm_fast {__version__}")
    print(backends())
    return 0


def _demo(out: Path, train_steps: int | None, seed: int, progress: bool) -> int:
    from dataclasses import replace

    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import safetensors  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        print(f"ddpm-fast demo needs {error.name}: pip install 'ddpm_fast[demo]'", file=sys.stderr)
        return 2
    from .training import digits

    config = digits.DigitsConfig(seed=seed)
    if train_steps is not None:
        config = replace(config, train_steps=train_steps)
    try:
        report = digits.run(out, config, progress)
    except OSError as error:
        print(f"ddpm-fast demo cannot write to {out}: {error}", file=sys.stderr)
        return 2
    generated, real = report["accuracy_on_generated"], report["accuracy_on_held_out_real"]
    print(
        f"{generated:.1%} of {report['generated']} generated digits recognised as the class asked "
        f"for ({real:.1%} of {report['images_held_out']} real ones held out), "
        f"{report['seconds_total']:.0f} s in all"
    )
    print(f"see samples.png, denoising.gif, loss.png and report.json in {out}")
    if generated < report["required_accuracy"] and train_steps is None:
        print(f"that is less than {report['required_accuracy']:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
