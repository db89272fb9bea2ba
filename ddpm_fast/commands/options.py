"""What the commands that use a trained model have in common."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import positive

if TYPE_CHECKING:
    import torch

    from ..training.checkpoints import LoadedModel
    from ..training.draw import DrawConfig


def seed(text: str) -> int:
    """An argument's value, a seed of the noise."""
    value = int(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError("must lie in 0 … 2^64 - 1")
    return value


def finite(text: str) -> float:
    """An argument's value, a number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError("must be finite")
    return value


def ema(text: str) -> float | Literal["first"] | None:
    """An argument's value: an average's rate, first or none."""
    if text == "first":
        return "first"
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a rate, or none; got {text!r}") from None


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, where, how precisely."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or one of its steps"
    )
    parser.add_argument(
        "--ema",
        type=ema,
        default="first",
        metavar="RATE|none",
        help="which average of the weights; none: the weights themselves (the config's first)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU where there is one)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the model (%(default)s)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A model, and how much of it at a time."""
    add_weight_options(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, help="(%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """How images are drawn."""
    parser.add_argument("--method", choices=("ddpm", "ddim"), default="ddpm", help="(%(default)s)")
    parser.add_argument("--num-steps", type=positive, help="of the method (all that it has)")
    parser.add_argument(
        "--spacing",
        choices=("leading", "trailing", "linspace"),
        default="leading",
        help="of the steps, where they are not all (%(default)s)",
    )
    parser.add_argument("--eta", type=finite, default=0.0, help="of ddim, 0 … 1 (%(default)s)")
    parser.add_argument("--guidance", type=finite, metavar="SCALE", help="classifier-free")


def draw_config(arguments: argparse.Namespace) -> DrawConfig:
    """Of the options above.

    Raises:
        ValueError: eta for a method that has none.
    """
    from ..training.draw import DrawConfig

    if arguments.eta and arguments.method != "ddim":
        raise ValueError(f"--eta is of --method ddim; the method is {arguments.method}")
    return DrawConfig(
        seed=arguments.seed,
        method=arguments.method,
        num_steps=arguments.num_steps,
        spacing=arguments.spacing,
        eta=arguments.eta,
        class_label=getattr(arguments, "class_label", None),
        guidance_scale=arguments.guidance,
        precision=arguments.precision,
    )


def load(arguments: argparse.Namespace, local_rank: int = 0) -> tuple[LoadedModel, torch.device]:
    """The model, and where it is to run.

    Raises:
        OSError, RuntimeError, ValueError: no such checkpoint, average or device.
    """
    import torch

    from ..ops.checks import indexed
    from ..training.checkpoints import load_model

    if arguments.device is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    else:
        try:
            device = torch.device(arguments.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda; got {arguments.device!r}")
        if device.type == "cuda" and device.index is None:
            count = max(1, torch.cuda.device_count())
            device = torch.device("cuda", local_rank % count)
        device = indexed(device)
    return load_model(arguments.checkpoint, arguments.ema), device


def failed(command: str, error: object, status: int) -> int:
    """Says on stderr, in one line, what went wrong; the status."""
    message = str(error).partition("\n")[0] or type(error).__name__
    print(f"ddpm-fast {command}: {message}", file=sys.stderr)
    return status
