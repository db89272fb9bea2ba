"""Checkpoints: config.json and model.safetensors in a folder, never pickle.

Files are written beside their final name and moved there, so that none is ever half there. Needs
safetensors, which is imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # a system without flock
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_AN_HOUR = 3600.0  # seconds

_Config = TypeVar("_Config")
_Model = TypeVar("_Model", bound=nn.Module)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file whole or not at all.

    Meanwhile it has a name beside ``path`` that no other process takes, on whichever machine, and
    is locked: :func:`remove_leftover` tells by that whether its process is still there.
    """
    written = False
    while not written:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with open(partial, "xb") as file:
                if fcntl is not None and not _locked(file):
                    continue  # taken for a leftover in the moment before it was locked
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:
                    os.replace(partial, path)
            if fcntl is None:  # such systems do not move a file that is open
                os.replace(partial, path)
            written = True
        finally:
            partial.unlink(missing_ok=True)


def remove_leftover(partial: Path) -> None:
    """Removes what :func:`write_bytes` has left half written in a process that was killed.

    A file that a process is writing stays, and so does one that cannot be removed. Where the file
    system has no locks, that is one of the last hour.
    """
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                if time.time() - os.fstat(file.fileno()).st_mtime < _AN_HOUR:
                    return
        partial.unlink()


def _locked(file: IO[bytes]) -> bool:
    """Locks a file; whether it still has a name then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return os.fstat(file.fileno()).st_nlink > 0


def sync_folder(folder: Path) -> None:
    """What was renamed in it stays so if the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(directory: str | os.PathLike[str], model: nn.Module, config: Any) -> None:
    """Writes the weights, then the config. Each names the other: a pair that was not written
    together, because the second failed, does not load."""
    write(directory, _state(model), type(model).__name__, config)


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    architecture: str,
    config: Any,
) -> None:
    """:func:`save` of a model's tensors by name, wherever they were gathered."""
    from safetensors.torch import save as to_bytes

    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"a checkpoint is a directory; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": "ddpm_fast",
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),  # tuples as JSON has them
    }
    metadata = {"format": "pt", "config_sha256": _digest(description["config"])}
    write_bytes(folder / WEIGHTS, *_in_order(to_bytes(tensors, metadata=metadata)))
    write_bytes(folder / CONFIG, (json.dumps(description, indent=2) + "\n").encode())


def _in_order(data: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file whose metadata are sorted, so that equal weights are equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(end - 8), memoryview(data)[end:]


def load_config(
    directory: str | os.PathLike[str], architecture: str, config_type: type[_Config]
) -> _Config:
    """The config of a checkpoint, checked to be of ``architecture``."""
    path = _existing(directory, CONFIG)
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != "ddpm_fast":
        raise ValueError(f"{path} does not describe a ddpm_fast checkpoint")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this ddpm_fast reads version 1")
    if description.get("architecture") != architecture:
        raise ValueError(
            f"{path} describes a {description.get('architecture')}, not a {architecture}"
        )
    try:
        return config_type(**description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not configure a {architecture}: {error}") from error


def load_weights(directory: str | os.PathLike[str], shapes: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, of which ``shapes`` has those that must be there, and no others."""
    from safetensors import safe_open

    path = _existing(directory, WEIGHTS)
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        written_with = (file.metadata() or {}).get("config_sha256")
    check(path, tensors, {name: tensor.shape for name, tensor in _state(shapes).items()})
    # Of the config as it stands there: that of an earlier version has fewer fields.
    if written_with != _digest(read_json(_existing(directory, CONFIG))["config"]):
        raise ValueError(
            f"{path} and {CONFIG} were not saved together: was a save interrupted, or the config "
            "edited?"
        )
    return tensors


def skeleton(architecture: Callable[[_Config], _Model], config: _Config, source: object) -> _Model:
    """A model without memory: a damaged config's would be of any size, and its weights, which
    :func:`check` compares with it, have that of their file.

    Raises:
        ValueError: tensors so large that they have no size.
    """
    try:
        with torch.device("meta"):
            return architecture(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{source} describes a model that cannot be made: {reason}") from error


def build(
    architecture: Callable[[_Config], _Model],
    config: _Config,
    tensors: Mapping[str, Tensor],
    source: object,
    device: torch.device | str = "cpu",
) -> _Model:
    """A model with its weights, of their own dtype where they have one.

    It is made as its class makes it: what a subclass has beside its weights is there. To be called
    once a :func:`skeleton` has shown that the config is no larger than the file.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # weights that are written over
        model = architecture(config)
    check(source, tensors, {name: tensor.shape for name, tensor in _state(model).items()})
    model.to(device=device, dtype=common_dtype(tensors) or torch.float32)
    model.load_state_dict(tensors)
    return model


def read_json(path: Path) -> Any:
    """What a file holds; ValueError where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number, or nesting, without end
        raise ValueError(f"{path} is not JSON (cut short?): {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is cut short, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check(source: object, found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """That a source's tensors are floating point, and those of ``shapes`` and no others.

    Raises:
        ValueError: which are missing, unknown or of another shape or kind.
    """
    problems = (
        [f"{name} is missing" for name in shapes if name not in found]
        + [f"{name} is not of this architecture" for name in found if name not in shapes]
        + [
            f"{name} has shape {list(found[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != shape
        ]
    )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:3])}{more}")
    dtypes = {tensor.dtype for tensor in found.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{source} holds weights that are not floating point: {dtypes}")


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """That of all tensors, or None where they differ."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    return model.state_dict()


def _existing(directory: str | os.PathLike[str], name: str) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: no such directory")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}: {name} is missing")
    return path
