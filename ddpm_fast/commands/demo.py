"""ddpm-fast demo: digits, from training to a judgement."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import missing_package, positive, seed


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="train on handwritten digits and draw some")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the results (%(default)s)"
    )
    parser.add_argument("--train-steps", type=positive, help="fewer: a quick look, worse digits")
    parser.add_argument("--seed", type=seed, default=0, help="0 … 2^32 - 1 (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if missing_package("demo", "demo", ("matplotlib", "PIL", "safetensors", "sklearn", "tqdm")):
        return 2
    from ..training import digits

    config = digits.DigitsConfig(seed=arguments.seed)
    if arguments.train_steps is not None:
        config = replace(config, train_steps=arguments.train_steps)
    try:
        report = digits.run(arguments.out, config, not arguments.quiet)
    except OSError as error:
        print(f"ddpm-fast demo cannot write to {arguments.out}: {error}", file=sys.stderr)
        return 2
    generated, real = report["accuracy_on_generated"], report["accuracy_on_held_out_real"]
    print(
        f"{generated:.1%} of {report['generated']} generated digits recognised as the class asked "
        f"for ({real:.1%} of {report['images_held_out']} real ones held out), "
        f"{report['seconds_total']:.0f} s in all"
    )
    print(f"see samples.png, denoising.gif, loss.png and report.json in {arguments.out}")
    print(f"more of them: ddpm-fast serve {shlex.quote(str(arguments.out / 'checkpoint'))}")
    if generated < report["required_accuracy"] and arguments.train_steps is None:
        print(f"that is less than {report['required_accuracy']:.0%}", file=sys.stderr)
        return 1
    return 0
