"""Checkpoints of runs: written whole or not at all, verified when read.

checkpoints/step-00000200/ holds config.json and model.safetensors, as UNet.save_pretrained writes
them; ema.safetensors, "<rate>/<parameter>"; optimizer.safetensors, "<state>/<parameter>", and
"loss/<tensor>" of the loss; state.json, written last: the run's config, the counters, and each
file's size and SHA-256. The folder is written under another name, synced and renamed; `latest` is
a relative link to the newest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..nn import UNet
from ..nn import checkpoint as weights
from .config import RunConfig
from .fields import ConfigError, NewerFormatError

FORMAT, FORMAT_VERSION = "ddpm_fast checkpoint", 1
STATE, AVERAGES, OPTIMIZER = "state.json", "ema.safetensors", "optimizer.safetensors"
FILES = (weights.CONFIG, weights.WEIGHTS, AVERAGES, OPTIMIZER)
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is cut short, damaged, or of another kind: which file, and how."""


class NewerCheckpointError(CheckpointError):
    """A checkpoint that a later version wrote: nothing is wrong with it."""


@dataclass
class Snapshot:
    """All that a run goes on from.

    Attributes:
        config: of the run.
        step, samples: steps done and samples consumed.
        model: the weights by name, on the host.
        averages: of each rate, the same.
        optimizer: its state and the loss's, by name.
        state: what else there is, for JSON: hyperparameters, the scaler, the log's sums.
    """

    config: RunConfig
    step: int
    samples: int
    model: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def write_checkpoint(checkpoints: Path, snapshot: Snapshot, keep: int = 0) -> Path:
    """Writes a checkpoint, points `latest` at it, then removes all but the last ``keep``.

    Whatever fails or kills the process, the checkpoints that were there stay as they were, and
    `latest` leads to a whole one.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    name = folder_name(snapshot.step)
    partial, final = checkpoints / f".{name}.partial", checkpoints / name
    checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_folder(partial, snapshot)
        if final.exists():
            set_aside(final)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    weights.sync_folder(checkpoints)
    point_latest(checkpoints, name)
    _prune(checkpoints, keep, name)
    return final


def write_folder(folder: Path, snapshot: Snapshot) -> None:
    """The files of one checkpoint, state.json last; what is in the folder already is replaced.

    Raises:
        OSError: they cannot be written.
    """
    from safetensors.torch import save

    averages = {
        f"{float(rate)!r}/{parameter}": tensor
        for rate, tensors in snapshot.averages.items()
        for parameter, tensor in tensors.items()
    }
    weights.write(folder, snapshot.model, UNet.__name__, snapshot.config.unet)
    weights.write_bytes(folder / AVERAGES, save(averages))
    weights.write_bytes(folder / OPTIMIZER, save(snapshot.optimizer))
    state = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": snapshot.step,
        "samples": snapshot.samples,
        **snapshot.state,
        "config": snapshot.config.to_dict(),
        "files": {file: _fingerprint(folder / file) for file in FILES},
    }
    text = json.dumps(state, indent=2, ensure_ascii=False) + "\n"
    # A name that is no UTF-8 comes as surrogates, which JSON writes as \udcXX.
    weights.write_bytes(folder / STATE, text.encode(errors="backslashreplace"))
    weights.sync_folder(folder)


def steps_in(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, oldest first; whether they are whole is not looked at."""
    found = []
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
    return sorted(found)


def set_aside(path: Path) -> Path:
    """Renames a checkpoint that is not to be used, so that none of its bytes are lost."""
    number, aside = 1, path.with_name(f"broken-{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"broken-{path.name}-{number}")
    os.rename(path, aside)
    return aside


def remove_leftovers(checkpoints: Path) -> None:
    """What a process that was killed has left half written or half removed."""
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.name.startswith(".") and path.name.endswith((".partial", ".removing")):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def verify(folder: Path, files: Iterable[str] = FILES) -> dict[str, Any]:
    """A checkpoint's state.json, after ``files`` were found whole.

    Raises:
        CheckpointError: a file that is missing, cut short or changed; or another kind of folder.
    """
    path = folder / STATE
    if not path.is_file():
        if (folder / weights.WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} holds a model without its noise schedule and prediction: {STATE} is "
                "missing. UNet.from_pretrained reads such a folder; a run's checkpoint is needed "
                "here"
            )
        raise CheckpointError(f"{folder} is no checkpoint of a run: {STATE} is missing")
    try:
        state = weights.read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a checkpoint of a ddpm_fast run")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise (NewerCheckpointError if newer else CheckpointError)(
            f"{path} has format version {version}; this ddpm_fast reads version {FORMAT_VERSION}"
            f"{': take a later ddpm_fast' if newer else ''}"
        )
    for counter in ("step", "samples"):
        if type(state.get(counter)) is not int or state[counter] < 0:
            raise CheckpointError(f"{path} does not count {counter}: {state.get(counter)!r}")
    listed, names = state.get("files"), state.get("class_names")
    if names is not None and not (isinstance(names, list) and all(type(n) is str for n in names)):
        raise CheckpointError(f"{path} does not name classes: {names!r}")
    for file in files:
        expected = listed.get(file) if isinstance(listed, dict) else None
        if not isinstance(expected, dict) or type(expected.get("bytes")) is not int:
            raise CheckpointError(f"{path} does not list {file}")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing")
        size = (folder / file).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{folder / file} has {size:,} bytes instead of {expected['bytes']:,}: it was cut "
                "short"
            )
        if _fingerprint(folder / file) != expected:
            raise CheckpointError(f"{folder / file} is damaged: its SHA-256 is not {STATE}'s")
    return state


def read_checkpoint(folder: Path) -> Snapshot:
    """What :func:`write_checkpoint` wrote.

    Raises:
        CheckpointError: as :func:`verify`.
    """
    state = verify(folder)
    for name in ("format", "format_version", "files"):
        del state[name]
    config = _config(folder, state.pop("config", None))
    averages: dict[float, dict[str, Tensor]] = {rate: {} for rate in config.ema_rates}
    for name, tensor in _tensors(folder / AVERAGES).items():
        rate, parameter = _averaged(name)
        if rate not in averages:
            raise CheckpointError(f"{folder / AVERAGES} has {name}, an average not of {STATE}")
        averages[rate][parameter] = tensor
    return Snapshot(
        config,
        state.pop("step"),
        state.pop("samples"),
        _tensors(folder / weights.WEIGHTS),
        averages,
        _tensors(folder / OPTIMIZER),
        state,
    )


def _averaged(name: str) -> tuple[float | None, str]:
    """The rate, None where it is none, and the parameter that a name in ema.safetensors is of.
    Rates compare as numbers: 0 and 0.0 are one."""
    rate, _, parameter = name.partition("/")
    try:
        return float(rate), parameter
    except ValueError:
        return None, parameter


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return weights.read_safetensors(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def newest_whole(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Raises:
        NewerCheckpointError: a later version's, before a whole one was found.
        OSError: one that cannot be read, the same.
    """
    broken = {}
    for _, path in reversed(steps_in(checkpoints)):
        try:
            _config(path, verify(path).get("config"))
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            broken[path] = str(error)
        else:
            return path, broken
    return None, broken


def last_good(checkpoints: Path) -> str:
    """The newest checkpoint that can be read and is whole, in words for an error; "" for none."""
    for _, path in reversed(steps_in(checkpoints)):
        with contextlib.suppress(CheckpointError, OSError):
            _config(path, verify(path).get("config"))
            return f"; the last good checkpoint is {path}"
    return ""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model and what it takes to use it.

    Attributes:
        model: in eval mode, on the CPU.
        config: of its run; ``config.build_schedule()`` is its forward process.
        step: after which it was saved.
        path: the checkpoint's folder.
        class_names: of the labels 0, 1, …; None where there are none, or the checkpoint is of a
            version that did not keep them.
    """

    model: UNet
    config: RunConfig
    step: int
    path: Path
    class_names: list[str] | None = None


def load_model(
    path: str | os.PathLike[str], ema: float | Literal["first"] | None = "first"
) -> LoadedModel:
    """The model of a run, to sample with.

    Args:
        path: a run's folder, its checkpoints/latest, or any of its checkpoints.
        ema: which average of the weights, by its rate; "first" of the config's, or the weights
            themselves where it has none; None: the weights themselves.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        CheckpointError: a checkpoint that is cut short, or a folder of another kind.
        ValueError: no average of that rate.
    """
    from safetensors import SafetensorError, safe_open

    folder = _checkpoint_of(Path(path))
    try:
        config = _config(folder, verify(folder, ()).get("config"))
        if ema == "first":
            ema = next(iter(config.ema_rates), None)
        if ema is not None and ema not in config.ema_rates:
            raise ValueError(f"ema must be one of {list(config.ema_rates)}, or None; got {ema!r}")
        file = weights.WEIGHTS if ema is None else AVERAGES
        state = verify(folder, (file,))
    except CheckpointError as error:
        raise type(error)(f"{error}{last_good(folder.parent)}") from error
    try:
        shapes = weights.skeleton(UNet, config.unet, folder / STATE).state_dict()
        with safe_open(folder / file, framework="pt") as tensors:
            found = {
                parameter: tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118
                for rate, parameter in [(None, name) if ema is None else _averaged(name)]
                if rate == ema
            }
        weights.check(folder / file, found, {n: t.shape for n, t in shapes.items()})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no model: {error}") from error
    model = weights.build(UNet, config.unet, found, folder / file).eval()
    return LoadedModel(model, config, state["step"], folder, state.get("class_names"))


def _checkpoint_of(path: Path) -> Path:
    if not path.is_dir():
        what = "it is a file" if path.exists() else "there is nothing there"
        raise FileNotFoundError(f"no checkpoint at {path}: {what}")
    for folder in (path / "checkpoints", path):
        found = steps_in(folder)
        if found:
            latest = folder / LATEST
            return latest.resolve() if latest.is_dir() else found[-1][1]
    if (path / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: the run has not written one yet")
    return path.resolve()


def _config(folder: Path, values: Any) -> RunConfig:
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        kind = NewerCheckpointError if isinstance(error, NewerFormatError) else CheckpointError
        raise kind(f"{folder / STATE} does not configure a run: {error}") from error


def _fingerprint(path: Path) -> Mapping[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def point_latest(checkpoints: Path, name: str) -> None:
    """Leads `latest` to a checkpoint, in one step."""
    link = checkpoints / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    os.symlink(name, link)
    os.replace(link, checkpoints / LATEST)
    weights.sync_folder(checkpoints)


def _prune(checkpoints: Path, keep: int, written: str) -> None:
    """Out of sight first: what is half removed must not look like a checkpoint."""
    needed = {written, os.readlink(checkpoints / LATEST)}
    for _, path in steps_in(checkpoints)[:-keep] if keep else []:
        if path.name in needed:
            continue
        hidden = checkpoints / f".{path.name}.removing"
        with contextlib.suppress(OSError):  # it takes room, nothing else
            os.rename(path, hidden)
            shutil.rmtree(hidden)
