"""ddpm-fast sample: images of a trained model, a PNG file each."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from . import missing_package, non_negative, positive
from .options import add_method_options, add_model_options, draw_config, failed, load


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="draw images with a trained model",
        description="Draws images 0 … N - 1 of a seed: 000000.png … and grid.png. Those that are "
        "there already are kept, so that a command that was interrupted can be given again.",
        epilog="Several processes split the images: torchrun --nproc-per-node 2 -m ddpm_fast.cli "
        "-- sample … (without the two dashes torchrun takes --num for one of its own options).",
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
        "--overwrite", action="store_true", help="draw all, whatever is in the folder"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    modules = ("PIL", "safetensors", *([] if arguments.quiet else ["tqdm"]))
    try:
        return 2 if missing_package("sample", "demo", modules) else _run(arguments)
    except KeyboardInterrupt:
        return failed("sample", "interrupted; the same command again draws what is missing", 130)


def _run(arguments: argparse.Namespace) -> int:
    from ..training.draw import Artist, count_beyond, draw_folder

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        config = draw_config(arguments)
        loaded, device = load(arguments, int(os.environ.get("LOCAL_RANK", rank)))
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
        return failed("sample", f"cannot write to {out}: {error.strerror or error}", 1)
    except (FloatingPointError, RuntimeError) as error:
        return failed("sample", error, 1)
    beyond = count_beyond(out, arguments.num) if arguments.overwrite and rank == 0 else 0
    if beyond:
        print(
            f"{out} holds {beyond} image{'s' * (beyond != 1)} of numbers from {arguments.num} on, "
            "drawn before: they stay as they were",
            file=sys.stderr,
        )
    who = "" if world_size == 1 else f"process {rank} of {world_size}: "
    print(
        f"{who}drew {drawn} of images 0 … {arguments.num - 1} in {out}, by the model of step "
        f"{loaded.step}"
    )
    return 0
