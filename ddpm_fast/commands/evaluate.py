"""ddpm-fast evaluate: bits/dim of a data set, and the Fréchet distance of a model's samples."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import missing_package, non_negative, positive
from .options import add_method_options, add_model_options, draw_config, failed, load

if TYPE_CHECKING:
    import torch

    from ..training.data import ImageData
    from ..training.frechet import FeatureExtractor


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model",
        description="Bits/dim of a data set, by the variational bound, and the Fréchet distance "
        "between the data and the model's samples, by the features of a classifier. Without "
        "--bits-per-dim or --frechet: both for digits, bits/dim for a folder.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--data", required=True, metavar="digits|FOLDER", help="images that the model has not seen"
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="test",
        help="of digits, or of FOLDER/train and FOLDER/test where there are both (%(default)s)",
    )
    parser.add_argument("--num", type=positive, metavar="N", help="of images, at random (all)")
    parser.add_argument("--workers", type=non_negative, default=0, help="that read images")
    parser.add_argument(
        "--on-bad-image",
        choices=("raise", "skip"),
        default="raise",
        help="at an image that cannot be read (%(default)s)",
    )
    parser.add_argument("--bits-per-dim", action="store_true", help="measure bits/dim")
    parser.add_argument(
        "--num-timesteps",
        type=positive,
        metavar="K",
        help="to evaluate of each image, for an unbiased estimate (all)",
    )
    parser.add_argument("--frechet", action="store_true", help="measure the Fréchet distance")
    parser.add_argument(
        "--num-samples", type=positive, metavar="M", help="to draw (as many as images)"
    )
    parser.add_argument(
        "--features",
        choices=("digits", "inception"),
        help="digits: of a small classifier; inception: of torch-fidelity, for FID (by the data)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there, as JSON")
    add_method_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    modules = ["PIL", "safetensors", *([] if arguments.quiet else ["tqdm"])]
    if "digits" in (arguments.data, arguments.features):
        modules.append("sklearn")
    try:
        return 2 if missing_package("evaluate", "demo", tuple(modules)) else _run(arguments)
    except KeyboardInterrupt:
        return failed("evaluate", "interrupted", 130)


def _run(arguments: argparse.Namespace) -> int:
    from ..nn.checkpoint import write_bytes
    from ..training.data import open_data
    from ..training.draw import Artist
    from ..training.evaluate import evaluate_bits_per_dim, evaluate_frechet, number_of_images

    neither = not (arguments.bits_per_dim or arguments.frechet)
    wants_bits = arguments.bits_per_dim or neither
    wants_frechet = arguments.frechet or (neither and arguments.data == "digits")
    progress, common = not arguments.quiet, {"batch_size": arguments.batch_size}
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("it runs in one process; torchrun has started more")
        loaded, device = load(arguments)
        unet = loaded.config.unet
        data = open_data(
            arguments.data,
            image_size=unet.image_size,
            channels=unet.in_channels,
            split=arguments.split,
            workers=arguments.workers,
            on_bad_image=arguments.on_bad_image,
            num_classes=unet.num_classes,
            class_names=None if unet.num_classes is None else loaded.class_names,
            progress=progress,
        )
        number_of_images(data, arguments.num, at_least=2 if wants_frechet else 1)
        T, K = loaded.config.schedule.num_steps, arguments.num_timesteps
        if wants_bits and K not in (None, T) and not 3 <= K < T:
            raise ValueError(f"--num-timesteps must lie in 3 … {T}; got {K}")
        if wants_frechet:
            if arguments.num_samples == 1:
                raise ValueError("--num-samples must be at least 2 for a Fréchet distance; got 1")
            artist = Artist.of(loaded, draw_config(arguments), device)
            extractor = _extractor(arguments, data, device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return failed("evaluate", error, 2)
    out: Path | None = arguments.out
    try:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.is_dir():
                raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        return failed("evaluate", f"cannot write {out}: {error.strerror}", 1)
    report: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "ema": arguments.ema,
        "data": arguments.data,
        "split": arguments.split,
        "seed": arguments.seed,
        "precision": arguments.precision,
    }
    try:
        if wants_bits:
            report["bits_per_dim"] = evaluate_bits_per_dim(
                loaded,
                data,
                num=arguments.num,
                num_timesteps=arguments.num_timesteps,
                seed=arguments.seed,
                device=device,
                precision=arguments.precision,
                progress=progress,
                **common,
            )
            print(_bits_line(report["bits_per_dim"]))
        if wants_frechet:
            report["frechet"] = evaluate_frechet(
                artist,
                data,
                extractor,
                num=arguments.num,
                num_samples=arguments.num_samples,
                progress=progress,
                **common,
            )
            print(_frechet_line(report["frechet"]))
    except (FloatingPointError, OSError, RuntimeError, ValueError) as error:
        return failed("evaluate", error, 1)
    if data.bad_images:
        report["images_skipped"] = len(data.bad_images)
        print(f"{_counted(len(data.bad_images))} could not be read; the next one stood for each")
    if out is not None:
        try:
            write_bytes(out, (json.dumps(report, indent=2) + "\n").encode())
        except OSError as error:
            return failed("evaluate", f"cannot write {out}: {error.strerror}", 1)
    return 0


def _extractor(
    arguments: argparse.Namespace, data: ImageData, device: torch.device
) -> FeatureExtractor:
    """The features asked for, tried on an image."""
    from ..training.frechet import DigitsFeatures, InceptionFeatures

    name = arguments.features or ("digits" if arguments.data == "digits" else "inception")
    extractor: FeatureExtractor
    extractor = DigitsFeatures() if name == "digits" else InceptionFeatures(device)
    extractor(data.batch([0])[0])
    return extractor


def _bits_line(bits: dict[str, Any]) -> str:
    error = "" if bits["standard_error"] is None else f" ± {bits['standard_error']:.4f}"
    parts = ", ".join(f"{name} {bits[name.lower()]:.4f}" for name in ("prior", "KL", "decoder"))
    return (
        f"{bits['mean']:.4f}{error} bits/dim ({parts}) of {_counted(bits['images'])}, "
        f"{bits['timesteps']} timesteps each"
    )


def _frechet_line(frechet: dict[str, Any]) -> str:
    return (
        f"Fréchet distance {frechet['distance']:.4f} ({frechet['features']} features) between "
        f"{frechet['samples']} samples and {frechet['images']} images"
    )


def _counted(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"
