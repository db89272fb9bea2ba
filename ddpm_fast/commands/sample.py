"""ddpm-fast sample: images of a trained model, a PNG file each."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from . import missing_package, non_negative, positive
from .options import add_method_options, add_model_options, draw_config, failed, load

KILLED = 128  # a shell's status for a process that a signal ended, plus the signal
# torchrun hands on the Ctrl-C that the terminal has sent to all processes already.
_REPEATED_WITHIN_SECONDS = 3.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="draw images with a trained model",
        description="Draws images 0 … N - 1 of a seed: 000000.png … and grid.png. Those that are "
        "there already are kept, so that a command that was interrupted can be given again.",
        epilog="Several processes split the images, on one machine or several that share the "
        "folder: torchrun --nproc-per-node 2 -m ddpm_fast.cli -- sample … (without the two dashes "
        "torchrun takes --num for one of its own options), or RANK and WORLD_SIZE in the "
        "environment of each.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--num", "--num-images", type=positive, required=True, metavar="N", help="of images"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--class",
        dest="class_label",
        type=non_negative,
        metavar="K",
        help="of all images (an image's number mod the number of classes)",
    )
    add_method_options(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="draw in place of images of another model or other settings, which are refused else",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    modules = ("PIL", "safetensors", *([] if arguments.quiet else ["tqdm"]))
    try:
        with _stopped_by_signals():
            return 2 if missing_package("sample", "demo", modules) else _run(arguments)
    except KeyboardInterrupt as interrupt:
        status = getattr(interrupt, "status", KILLED + signal.SIGINT)
        return failed("sample", "interrupted; the same command again draws what is missing", status)


class _Stopped(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = KILLED + number


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop the drawing where it is, and let the files being written end."""
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _REPEATED_WITHIN_SECONDS:
            last = now
            raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        if last == -math.inf:  # else repeats are passed over until the process has ended
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


def _run(arguments: argparse.Namespace) -> int:
    from ..progress import per_second, span
    from ..training.draw import Artist, draw_folder
    from ..training.drawn_folder import Share

    try:
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        Share(arguments.num, arguments.batch_size, rank, world_size)
        config = draw_config(arguments)
        loaded, device = load(arguments, _number("LOCAL_RANK", rank))
        artist = Artist.of(loaded, config, device)
    except (OSError, RuntimeError, ValueError) as error:
        return failed("sample", error, 2)
    out: Path = arguments.out
    try:
        drawn = draw_folder(
            artist,
            out,
            arguments.num,
            batch_size=arguments.batch_size,
            rank=rank,
            world_size=world_size,
            overwrite=arguments.overwrite,
            progress=not arguments.quiet,
        )
    except FileExistsError as error:
        if error.errno is None:
            return failed("sample", f"{error}; take another --out, or --overwrite", 2)
        return failed("sample", f"cannot write to {out}: it is a file", 2)
    except OSError as error:
        return failed("sample", _explained(error, out), 1)
    except (FloatingPointError, RuntimeError) as error:
        return failed("sample", error, 1)
    if drawn.beyond and arguments.overwrite and rank == 0:
        print(
            f"{out} holds {drawn.beyond} image{'s' * (drawn.beyond != 1)} of numbers from "
            f"{arguments.num} on, drawn before: they stay as they were",
            file=sys.stderr,
        )
    who = "" if world_size == 1 else f"process {rank} of {world_size}: "
    took = ""
    if drawn.images:
        took = f" in {span(drawn.seconds)} ({per_second(drawn.images, drawn.seconds)})"
    print(
        f"{who}drew {drawn.images} of images 0 … {arguments.num - 1} in {out}{took}, by the model "
        f"of step {loaded.step}"
    )
    return 0


def _number(name: str, otherwise: int) -> int:
    """What torchrun, or who starts the processes by hand, has put into the environment."""
    text = os.environ.get(name, str(otherwise))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} in the environment must be an integer; got {text!r}") from None


def _explained(error: OSError, out: Path) -> str:
    reason = error.strerror or str(error)
    name = str(error.filename or "")
    if name.endswith(".png"):
        return f"cannot read {name}: {reason}"
    return (
        f"cannot write to {out}: {reason}; once that is put right, the same command draws what is "
        "missing"
    )
