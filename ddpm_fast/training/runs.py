"""A run's folder: begun, taken up again, and what may not be done to it.

config.json, log.jsonl, lock, samples/, checkpoints/, and tensorboard/ where that is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..nn.checkpoint import write_bytes
from .checkpoints import (
    NewerCheckpointError,
    Snapshot,
    last_good,
    newest_whole,
    point_latest,
    read_checkpoint,
    remove_leftovers,
    set_aside,
)
from .config import RunConfig
from .dataset import ImageData
from .errors import RunError
from .fields import ConfigError, merged
from .images import shown
from .journal import LOG, last_step
from .lock import RunLock
from .presets import completed, preset

CONFIG = "config.json"
_PARTS = (CONFIG, "checkpoints", LOG, "samples")


@dataclass
class RunFolder:
    """A run's folder in its first process, locked from the first look at a run that is there.

    Attributes:
        out: the folder.
        saved: the config of the run that is taken up again.
        checkpoint: to go on from.
        notes: what its owner should know of what was found.
    """

    out: Path
    saved: RunConfig | None = None
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    _lock: RunLock | None = None
    _broken: list[Path] = field(default_factory=list)
    _resume: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def look(self, resume: bool) -> None:
        """What is there.

        Raises:
            RunError: a run that is in use, or that would be overwritten; a config or checkpoints
                that cannot be used.
        """
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"{shown(self.out)} is a file; a run is kept in a folder", 2)
        self._resume = resume
        if not self._has_run():
            if resume:
                self.notes.append(f"there is no run in {shown(self.out)} yet: a new one begins")
            return
        self._take()
        self._find()

    def _has_run(self) -> bool:
        return any((self.out / part).exists() for part in _PARTS)

    def _find(self) -> None:
        """What to go on from; locked."""
        if not self._resume:
            raise RunError(
                f"{shown(self.out)} holds a run already: go on with it by --resume, or take "
                "another --out",
                2,
            )
        try:
            self.checkpoint, broken = newest_whole(self.checkpoints)
            self.saved = self._saved()
            if self.checkpoint is None:
                self._check_nothing_is_lost(broken)
        except NewerCheckpointError as error:
            raise RunError(str(error)) from error
        except OSError as error:
            raise self._unreadable(error) from error
        self._broken = list(broken)
        if broken:
            self.notes += [f"warning: {problem}" for problem in broken.values()]
            self.notes.append(
                f"warning: going on from {self.checkpoint}; what is broken is kept as broken-step-…"
            )

    def _check_nothing_is_lost(self, broken: Mapping[Path, str]) -> None:
        """A run without a checkpoint begins anew only where it had done nothing."""
        otherwise = f"to start over, remove {shown(self.out)} or take another --out"
        if broken:
            raise RunError(
                f"none of the checkpoints in {shown(self.checkpoints)} is whole: "
                f"{'; '.join(broken.values())}; {otherwise}"
            )
        log = self.out / LOG
        step = last_step(log)
        if step is not None:
            raise RunError(
                f"{shown(log)} goes to step {step}, and there is no checkpoint in "
                f"{shown(self.checkpoints)}; {otherwise}"
            )

    def begin(self, config: RunConfig, data: ImageData) -> Snapshot | None:
        """Makes the folder one of ``config``, trained on ``data``; what to go on from.

        Raises:
            RunError: the folder cannot be written, is in use, or its checkpoint is of another
                config or other data; or another process has begun a run there meanwhile.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._take()
                if self._has_run():  # begun by another process since the first look
                    self.notes.clear()
                    self._find()
                    if self.saved is not None:
                        _check_config(self.saved, config)
            snapshot = self._read(config, data)
            if self.checkpoint is not None:
                point_latest(self.checkpoints, self.checkpoint.name)
            for path in self._broken:
                set_aside(path)
            remove_leftovers(self.checkpoints)
            if self.saved != config or not (self.out / CONFIG).exists():
                text = config.to_json().encode(errors="backslashreplace")  # as in a checkpoint
                write_bytes(self.out / CONFIG, text)
        except OSError as error:
            raise RunError(
                f"cannot write to {shown(self.out)}: {error.strerror or error}"
            ) from error
        return snapshot

    def _read(self, config: RunConfig, data: ImageData) -> Snapshot | None:
        if self.checkpoint is None:
            return None
        try:
            snapshot = read_checkpoint(self.checkpoint)
        except OSError as error:
            raise self._unreadable(error) from error
        changed = snapshot.config.changes(config)
        if changed:
            raise RunError(
                f"{self.checkpoint} is of another config than {self.out / CONFIG}: "
                f"{'; '.join(changed)}",
                2,
            )
        check_data(snapshot, config, data)
        return snapshot

    def _unreadable(self, error: OSError) -> RunError:
        what = shown(error.filename or self.out)
        return RunError(
            f"cannot read {what}: {error.strerror or error}{last_good(self.checkpoints)}"
        )

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> None:
        if self._lock is None:
            try:
                self._lock = RunLock(self.out / "lock")
            except OSError as error:
                raise RunError(
                    f"cannot write to {shown(self.out)}: {error.strerror or error}"
                ) from error

    def _saved(self) -> RunConfig | None:
        path = self.out / CONFIG
        if not path.exists() and self.checkpoint is not None:
            self.notes.append(f"warning: {path} is missing; the last checkpoint's is taken")
            return read_checkpoint(self.checkpoint).config
        if not path.exists():
            return None
        try:
            return RunConfig.from_json(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ConfigError) as error:
            raise RunError(f"{path}: {error}", 2) from error


def check_data(snapshot: Snapshot, config: RunConfig, data: ImageData) -> None:
    """Looks whether the images are those that a run was trained on.

    Raises:
        RunError: which class has another name, or that the files are others.
    """
    path, state = shown(config.data.path), snapshot.state
    if "class_names" in state and state["class_names"] != data.class_names:
        before, now = state["class_names"], data.class_names
        if before is None or now is None:
            what = "has no classes" if now is None else f"has {len(now)} classes"
            had = "none" if before is None else str(len(before))
            raise RunError(f"data.path {path} {what}; the run began with {had}", 2)
        for label, (old, new) in enumerate(zip_longest(before, now)):
            if old != new:
                is_now = "not there" if new is None else repr(shown(new))
                was = "not there" if old is None else repr(shown(old))
                raise RunError(
                    f"data.path {path} has other classes than the run began with: label {label} is "
                    f"{is_now}, it was {was}",
                    2,
                )
    if state["num_images"] != len(data):
        raise RunError(
            f"data.path {path} has {len(data)} images; the run began with {state['num_images']}, "
            "and their order would be another",
            2,
        )
    if "files_sha256" not in state:  # of a version that did not keep it
        if snapshot.config.data.path != config.data.path:
            raise RunError(
                f"data.path: {shown(snapshot.config.data.path)} → {path}, and the checkpoint does "
                "not say which files the run began with",
                2,
            )
    elif state["files_sha256"] != data.files_sha256:
        raise RunError(
            f"data.path {path} has files of other names than the run began with, as many as they "
            "are: their order would be another",
            2,
        )


def _check_config(saved: RunConfig, config: RunConfig) -> None:
    changed = saved.changes(config)
    if changed:
        raise RunError(f"a run is resumed with its own config; changed: {'; '.join(changed)}", 2)


def wanted_values(
    explicit: Mapping[str, Any], preset_name: str | None, saved: RunConfig | None
) -> dict[str, Any]:
    """A config's values before the data are opened.

    Args:
        explicit: what the caller asks for, from a file and from options.
        preset_name: asked for; where nothing is, a new run takes its data's.
        saved: the config of the run that is taken up again.

    Raises:
        ConfigError: no data; a preset that is not there.
        RunError: a wish that a run that is taken up again cannot fulfil.
    """
    asked = merged(preset(preset_name), explicit) if preset_name is not None else dict(explicit)
    if saved is not None:
        values = merged(saved.to_dict(), asked)
        _check_config(saved, RunConfig.from_dict(values))
        return values
    path = asked.get("data", {}).get("path") if isinstance(asked.get("data", {}), dict) else None
    if path is None:
        raise ConfigError("data.path is missing: name the images by --data")
    return asked


def default_preset(path: str) -> str:
    """The recipe of a run that was told its data alone."""
    return "digits" if path == "digits" else "cifar10"


def opened_data(values: Mapping[str, Any]) -> tuple[ImageData, RunConfig]:
    """The data of a config, and the config completed by them.

    Raises:
        ConfigError: as :func:`completed`.
        RunError: data that cannot be opened.
    """
    from .data import open_data

    data, unet = values.get("data", {}), values.get("unet", {})
    if not isinstance(unet, dict):
        raise ConfigError(f"unet must be an object {{…}}; got {unet!r}")
    path = data["path"]
    options = {
        name: data[name] for name in ("workers", "on_bad_image") if data.get(name) is not None
    }
    with contextlib.suppress(KeyError):
        options["image_size"] = unet["image_size"]
    if unet.get("num_classes") is not None:
        options["num_classes"] = unet["num_classes"]
    try:
        images = open_data(
            path, channels=unet.get("in_channels", 1 if path == "digits" else 3), **options
        )
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"data: {error}", 2) from error
    return images, completed(values, images.image_shape, images.num_classes)
