"""A run's folder: begun, taken up again, and what may not be done to it.

config.json, log.jsonl, lock, samples/, checkpoints/, and tensorboard/ where that is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..nn.checkpoint import write_bytes
from .checkpoints import (
    Snapshot,
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
from .lock import RunLock
from .presets import completed, preset

CONFIG = "config.json"
_PARTS = (CONFIG, "checkpoints", "log.jsonl", "samples")


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
        if not any((self.out / part).exists() for part in _PARTS):
            if resume:
                self.notes.append(f"there is no run in {shown(self.out)} yet: a new one begins")
            return
        self._take()
        if not resume:
            raise RunError(
                f"{shown(self.out)} holds a run already: go on with it by --resume, or take "
                "another --out",
                2,
            )
        self.checkpoint, broken = newest_whole(self.checkpoints)
        self._broken = list(broken)
        if broken:
            self.notes += [f"warning: {problem}" for problem in broken.values()]
            on = "starting over" if self.checkpoint is None else f"going on from {self.checkpoint}"
            self.notes.append(f"warning: {on}; what is broken is kept as broken-step-…")
        self.saved = self._saved()

    def begin(self, config: RunConfig) -> Snapshot | None:
        """Makes the folder one of ``config``; what to go on from.

        Raises:
            RunError: the folder cannot be written, is in use, or its checkpoint is of another
                config.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._take()
            snapshot = None
            if self.checkpoint is not None:
                snapshot = read_checkpoint(self.checkpoint)
                changed = snapshot.config.changes(config)
                if changed:
                    raise RunError(
                        f"{self.checkpoint} is of another config than {self.out / CONFIG}: "
                        f"{'; '.join(changed)}",
                        2,
                    )
                point_latest(self.checkpoints, self.checkpoint.name)
            for path in self._broken:
                set_aside(path)
            remove_leftovers(self.checkpoints)
            if self.saved != config or not (self.out / CONFIG).exists():
                write_bytes(self.out / CONFIG, config.to_json().encode())
        except OSError as error:
            raise RunError(
                f"cannot write to {shown(self.out)}: {error.strerror or error}"
            ) from error
        return snapshot

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
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise RunError(f"{path}: {error}", 2) from error


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
        changed = saved.changes(RunConfig.from_dict(values))
        if changed:
            raise RunError(
                f"a run is resumed with its own config; changed: {'; '.join(changed)}", 2
            )
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
