"""ddpm-fast convert: a UNet's weights between ddpm_fast, diffusers and OpenAI's checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import missing_package, positive
from .options import ema, failed

if TYPE_CHECKING:
    from ..nn import UNet

# What this command writes, and so may replace
_WRITTEN = {"config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="bring a UNet's weights from or to diffusers",
        description="Writes the UNet of SRC to the folder DST, as UNet.from_pretrained or as "
        "diffusers reads it. What has no equivalent there is an error that names it.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="diffusers' folder of a UNet2DModel or of a pipeline; a .pt file of OpenAI's "
        "improved- or guided-diffusion; a folder of ddpm_fast's; a training run or one of its "
        "checkpoints",
    )
    parser.add_argument("target", type=Path, metavar="DST", help="folder, whole or not there")
    parser.add_argument(
        "--to",
        choices=("ddpm_fast", "diffusers"),
        help="what DST is (diffusers for what is ddpm_fast's, else ddpm_fast)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.json",
        help='of a .pt file: the options of OpenAI\'s scripts, {"image_size": 64, …}',
    )
    parser.add_argument(
        "--ema",
        type=ema,
        default="first",
        metavar="RATE|none",
        help="of a run: which average of the weights; none: the weights themselves (the config's "
        "first)",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="SIDE",
        help="of diffusers' models, where their sample_size does not say it",
    )
    parser.add_argument(
        "--null-class",
        action="store_true",
        help="of diffusers' models: the last class stands for none, for guidance",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="of diffusers' models: that of the files to read, fp16 for "
        "diffusion_pytorch_model.fp16.safetensors",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return failed("convert", "interrupted; DST is as it was", 130)


def _run(arguments: argparse.Namespace) -> int:
    if missing_package("convert", "demo", ("safetensors",)):
        return 2
    target = Path(os.path.realpath(arguments.target))
    try:
        kind = _kind(arguments.source)
        to = arguments.to or ("diffusers" if kind in ("run", "ddpm_fast") else "ddpm_fast")
        if to == "diffusers" and missing_package("convert", "diffusers", ("diffusers",)):
            return 2
        _check_options(arguments, kind)
        if to == "ddpm_fast":
            _check_no_pipeline(arguments.target)
        _check_target(target, arguments.overwrite)
        model, what = _load(arguments, kind)
        converted = model.to_diffusers() if to == "diffusers" else model
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return failed("convert", error, 2)
    try:
        _write(target, converted)
    except OSError as error:
        return failed("convert", f"cannot write {target}: {error.strerror or error}", 1)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"converted {what} to {to} in {arguments.target}: {parameters:,} parameters, {dtype}")
    return 0


def _kind(source: Path) -> str:
    """openai, run, ddpm_fast or diffusers."""
    from ..nn.checkpoint import CONFIG, read_json
    from ..training.checkpoints import STATE, steps_in

    if source.is_file():
        return "openai"
    if not source.is_dir():
        raise FileNotFoundError(f"there is nothing at {source}")
    if (source / "checkpoints").is_dir() or (source / STATE).is_file() or steps_in(source):
        return "run"
    if (source / CONFIG).is_file():
        description = read_json(source / CONFIG)
        found = description.get("format") if isinstance(description, dict) else None
        if found is not None:
            return "run" if found == "ddpm_fast run" else "ddpm_fast"
    return "diffusers"


def _check_options(arguments: argparse.Namespace, kind: str) -> None:
    for name, given, of in (
        ("--config", arguments.config is not None, "openai"),
        ("--ema", arguments.ema != "first", "run"),
        ("--image-size", arguments.image_size is not None, "diffusers"),
        ("--null-class", arguments.null_class, "diffusers"),
        ("--variant", arguments.variant is not None, "diffusers"),
    ):
        if given and kind != of:
            whose = {
                "openai": "OpenAI's .pt files",
                "run": "training runs",
                "diffusers": "diffusers' folders",
            }[of]
            raise ValueError(f"{name} is of {whose}; {arguments.source} is none")
    if kind == "openai" and arguments.config is None:
        raise ValueError(
            f"{arguments.source} holds no options of its model: give OpenAI's in --config FILE.json"
        )


def _check_no_pipeline(target: Path) -> None:
    """A pipeline would no longer load with our format in a component's place."""
    for path in (os.path.abspath(target), os.path.realpath(target)):
        pipeline = Path(path).parent
        if (pipeline / "model_index.json").is_file():
            raise FileExistsError(
                f"{target} is in a pipeline of diffusers, which reads diffusers' format only: take "
                "another DST, or --to diffusers"
            )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is written to a folder")
    inside = {path.name for path in target.iterdir()}
    if inside and not overwrite:
        raise FileExistsError(f"{target} is there already; take another DST, or --overwrite")
    if others := sorted(inside - _WRITTEN):
        raise FileExistsError(
            f"{target} holds what is no converted model, {others[0]}: it is not overwritten"
        )
    kind = _class_name(target)
    if kind not in (None, "UNet2DModel"):  # another component of a pipeline
        raise FileExistsError(f"{target} holds {kind}: it is not overwritten")


def _class_name(folder: Path) -> Any:
    """What diffusers' config.json in it is of, if there is one that can be read."""
    from ..nn.checkpoint import CONFIG, read_json

    try:
        found = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return None
    return found.get("_class_name") if isinstance(found, dict) else None


def _load(arguments: argparse.Namespace, kind: str) -> tuple[UNet, str]:
    """The model, and what it is in words."""
    from ..nn import UNet
    from ..nn.checkpoint import read_json
    from ..training.checkpoints import load_model

    source: Path = arguments.source
    if kind == "openai":
        options = read_json(arguments.config)
        if not isinstance(options, dict):
            raise ValueError(f"{arguments.config} must hold an object {{…}} of OpenAI's options")
        return UNet.from_openai(source, options), f"OpenAI's {source}"
    if kind == "run":
        loaded = load_model(source, arguments.ema)
        rate = arguments.ema
        if rate == "first":
            rate = next(iter(loaded.config.ema_rates), None)
        which = "the weights" if rate is None else f"average {rate}"
        return loaded.model, f"{which} of step {loaded.step} of {source}"
    if kind == "ddpm_fast":
        return UNet.from_pretrained(source), f"ddpm_fast's {source}"
    model = UNet.from_diffusers(
        source,
        image_size=arguments.image_size,
        null_class=arguments.null_class,
        variant=arguments.variant,
    )
    return model, f"diffusers' {source}"


def _write(target: Path, model: Any) -> None:
    """Puts a folder in place, which replaces the old one where there is one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    from safetensors import SafetensorError

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(partial)
        if target.exists():
            os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, target)
            raise
    except SafetensorError as error:  # diffusers' way of saying that the disk is full
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
