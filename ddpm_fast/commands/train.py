"""ddpm-fast train: a run, from the beginning or where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import missing_package, non_negative, positive

if TYPE_CHECKING:
    from ..training.config import RunConfig
    from ..training.dataset import ImageData
    from ..training.world import World

PACKAGES = ("PIL", "safetensors", "tqdm")
KILLED = 128  # a shell's status for a process that a signal ended, plus the signal


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model, or go on training it",
        description="Trains a UNet and keeps config.json, log.jsonl, samples/ and checkpoints/ in "
        "a folder. Ctrl-C saves and stops; --resume goes on, to the same bits. Several processes: "
        "torchrun --nproc-per-node 2 -m ddpm_fast.cli train …",
    )
    parser.add_argument("--data", metavar="digits|FOLDER", help="what to train on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--preset",
        help="digits, cifar10, improved-cifar10 or image-256 (without --config: digits for the "
        "digits, cifar10 for a folder)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON, over the preset's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = (
        ("--steps", "steps", positive, "of the optimiser, in all"),
        ("--batch-size", "batch_size", positive, "samples a step, over all processes"),
        ("--seed", "seed", non_negative, "of all that is drawn"),
        ("--grad-accum", "grad_accum", positive, "parts a batch is computed in"),
        ("--image-size", "unet.image_size", positive, "side that images are brought to"),
        ("--workers", "data.workers", non_negative, "processes that read images"),
        ("--checkpoint-every", "output.checkpoint_every", positive, "steps between checkpoints"),
        ("--keep", "output.keep", non_negative, "checkpoints that stay; 0: all"),
        ("--log-every", "output.log_every", positive, "steps between lines of log.jsonl"),
        ("--sample-every", "output.sample_every", non_negative, "steps between samples; 0: none"),
    )
    for flag, field, kind, text in options:
        parser.add_argument(flag, dest=field, type=kind, metavar="N", help=text)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the arithmetic")
    parser.add_argument(
        "--on-bad-image",
        dest="data.on_bad_image",
        choices=("raise", "skip"),
        help="what an image that cannot be read does",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the config: --set optimizer.learning_rate=1e-4",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="several processes: whole weights in each, or parts (%(default)s)",
    )
    parser.add_argument("--no-tensorboard", action="store_true", help="no event files")
    parser.add_argument("--quiet", action="store_true", help="no bar, no messages but warnings")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if missing_package("train", "train", PACKAGES):
        return 2
    from ..training.world import leave

    status = _told(arguments)
    leave(status)
    return status


def _told(arguments: argparse.Namespace) -> int:
    """The status, after a line about what went wrong."""
    from ..training.errors import FailedElsewhere, RunError
    from ..training.fields import ConfigError
    from ..training.loop import explained
    from ..training.world import World

    world: World | None = None
    try:
        world = World(arguments.device)
        explicit = world.together(lambda: explicit_values(arguments))
        return _train(arguments, explicit, world)
    except KeyboardInterrupt:
        first = world is None or world.first
        return _say("interrupted; the last good checkpoint is as it was" if first else "", 130)
    except ConfigError as error:
        return _say(f"config: {error}", 2)
    except FailedElsewhere as error:
        if error.__cause__ is None:  # the first process has said why
            return error.status
        return _say(str(error), error.status)
    except RunError as error:
        return _say(str(error), error.status)
    except Exception as error:
        known = explained(error, world)
        if known is None:
            raise
        return _say(str(known), known.status)


def _train(arguments: argparse.Namespace, explicit: dict[str, Any], world: World) -> int:
    from ..training.loop import Loop
    from ..training.runs import (
        RunFolder,
        check_data,
        default_preset,
        opened_data,
        wanted_values,
    )
    from ..training.trainer import Trainer, check

    folder = RunFolder(arguments.out)

    def look() -> dict[str, Any]:
        folder.look(arguments.resume)
        name = arguments.preset
        path = explicit.get("data", {}).get("path")
        if folder.saved is None and path and name is None and arguments.config is None:
            name = default_preset(path)
            if path != "digits":
                folder.notes.append(f"preset {name}, for want of --preset and --config")
        return wanted_values(explicit, name, folder.saved)

    def opened() -> tuple[ImageData, RunConfig]:
        data, config = opened_data(values)
        check(config, world, arguments.parallel)
        return data, config

    try:
        values = world.share(look)
        data, config = world.together(opened)
        snapshot = world.share(lambda: folder.begin(config, data))
        if world.first:
            _show(arguments.quiet, folder.notes)
        if snapshot is not None:  # each process reads its own copy of the data
            world.together(lambda: check_data(snapshot, config, data))
        done = 0 if snapshot is None else snapshot.step
        if done >= config.steps:
            if world.first:
                print(f"nothing left to do: step {done} of {config.steps} is in {arguments.out}")
            return 0
        trainer = Trainer(config, world, arguments.parallel)
        if snapshot is not None:
            trainer.restore(snapshot)
        if world.first and not arguments.quiet:
            parameters = sum(p.numel() for p in trainer.model.parameters())
            print(
                f"{'step ' + str(done) if done else 'training'}: {len(data):,} images of "
                f"{'×'.join(map(str, data.image_shape))}, {parameters:,} parameters, "
                f"{world.size} process{'es' * (world.size > 1)} on {world.device.type}",
                file=sys.stderr,
            )
        received = Loop(trainer, data, arguments.out, snapshot, arguments.quiet).run()
        if world.first:
            _report(arguments.out, trainer.step_count, config.steps, data.bad_images)
        world.close()
        return KILLED + received if received else 0
    finally:
        folder.release()


def explicit_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for: the file's values, under the options'."""
    from ..training.config import parse_json
    from ..training.fields import ConfigError, merged

    values: dict[str, Any] = {}
    if arguments.config is not None:
        try:
            values = parse_json(arguments.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {arguments.config}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{arguments.config}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{arguments.config}: a config is an object {{…}}")
    fields = vars(arguments)
    names = [name for name in fields if "." in name]
    names += ["steps", "batch_size", "seed", "grad_accum", "precision"]
    given = [(name, fields[name]) for name in names if fields[name] is not None]
    if arguments.data is not None:
        folder = arguments.data != "digits"
        given.append(("data.path", os.path.abspath(arguments.data) if folder else "digits"))
    if arguments.no_tensorboard:
        given.append(("output.tensorboard", False))
    for name, value in [*given, *map(_assignment, arguments.set)]:
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merged(values, nested)
    data = values.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if isinstance(path, str) and path not in ("", "digits"):  # found again from any folder
        values = merged(values, {"data": {"path": os.path.abspath(path)}})
    return values


def _assignment(text: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value JSON or else a string."""
    from ..training.fields import ConfigError

    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"--set takes FIELD=VALUE; got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _show(quiet: bool, notes: list[str]) -> None:
    for note in notes:
        if not quiet or note.startswith("warning"):
            print(note, file=sys.stderr)


def _report(out: Path, step: int, steps: int, bad_images: dict[int, Any]) -> None:
    if bad_images:
        print(f"{len(bad_images)} images could not be read and were passed over", file=sys.stderr)
    state = "done" if step == steps else "stopped; --resume goes on"
    print(f"step {step} of {steps}, saved in {out / 'checkpoints' / 'latest'}: {state}")


def _say(message: str, status: int) -> int:
    if message:
        print(f"ddpm-fast train: {message}", file=sys.stderr, flush=True)
    return status
