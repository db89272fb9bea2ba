"""The directories that diffusers keeps a UNet2DModel in: a config, and weights in one file or
several, of two formats, perhaps under a variant's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .diffusers_config import CLASS
from .weights import read_pickle

NAME = "diffusion_pytorch_model"


def read(path: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Config and weights of a model's or a pipeline's directory, and where they stand."""
    if not path.is_dir():
        what = "it is a file" if path.exists() else "no such directory"
        raise FileNotFoundError(f"no {CLASS} at {path}: {what}")
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no {CLASS} at {folder}: config.json is missing")
    options = checkpoint.read_json(folder / "config.json")
    found = options.get("_class_name") if isinstance(options, dict) else None
    if found is None and isinstance(options, dict) and options.get("format") == "ddpm_fast":
        raise ValueError(f"{folder} is a ddpm_fast checkpoint: UNet.from_pretrained reads it")
    if found != CLASS:
        raise ValueError(f"{folder / 'config.json'} describes {found}, not a {CLASS}")
    safetensors, legacy = _names("safetensors", variant), _names("bin", variant)
    for name in (*safetensors, *legacy):
        if (folder / name).is_file():
            return options, _weights(folder / name), folder / name
    there = ", ".join(sorted(file.name for file in folder.glob("diffusion_*")))
    there = f"; there is {there} (a variant is read by its name)" if there else ""
    raise FileNotFoundError(f"no {CLASS} at {folder}: {safetensors[-1]} is missing{there}")


def _names(kind: str, variant: str | None) -> tuple[str, ...]:
    """Those of an index of several files, which diffusers prefers, and of one that is whole."""
    if variant is None:
        return f"{NAME}.{kind}.index.json", f"{NAME}.{kind}"
    return (
        f"{NAME}.{kind}.index.{variant}.json",
        f"{NAME}.{kind}.{variant}.index.json",  # as earlier versions had it
        f"{NAME}.{variant}.{kind}",
    )


def _weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".json":
        return _shards(path)
    return checkpoint.read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _shards(index: Path) -> dict[str, Tensor]:
    """Weights in several files, of which the index says what is where."""
    described = checkpoint.read_json(index)
    files = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} does not say in which files the weights are")
    tensors: dict[str, Tensor] = {}
    for file in sorted({Path(str(file)).name for file in files.values()}):
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"no {CLASS} at {index.parent}: {file} is missing")
        tensors.update(_weights(index.parent / file))
    return tensors
