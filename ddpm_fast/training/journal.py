"""What a run tells while it goes: log.jsonl, pictures of samples, a bar, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..nn.checkpoint import write_bytes
from .checkpoints import folder_name
from .config import RunConfig
from .pictures import grid, read_png

LOG = "log.jsonl"
# Of a line that was cut short, or is no such line
_DAMAGED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


def last_step(log: Path) -> int | None:
    """Of the last whole line of a log; None where there is none.

    Raises:
        OSError: it is there and cannot be read.
    """
    for line in reversed(log.read_bytes().splitlines() if log.exists() else []):
        with contextlib.suppress(*_DAMAGED):
            return int(json.loads(line)["step"])
    return None


class Journal:
    """Of one run, in its first process.

    Args:
        out: the run's folder.
        config: of the run.
        step: at which it begins; what a process that was killed has logged beyond is dropped.
        losses: since the last line of the log, kept in the checkpoint.
        quiet: no bar, and no messages but warnings.
    """

    def __init__(
        self, out: Path, config: RunConfig, step: int, losses: list[float], quiet: bool
    ) -> None:
        self._out, self._config, self._quiet = out, config, quiet
        self.losses = list(losses)
        self._forget_after(step)
        self._log: IO[str] = open(  # noqa: SIM115
            out / LOG, "a", encoding="utf-8", buffering=1
        )
        self._bar: Any = None
        self._board = self._tensorboard(step)
        self._bar = self._progress_bar(step)
        self._images, self._since = 0, time.perf_counter()

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def note(self, losses: list[float]) -> None:
        """The losses of the latest steps."""
        self.losses += losses
        self._images += len(losses) * self._config.batch_size
        if self._bar is not None:
            rate = self._images / max(time.perf_counter() - self._since, 1e-9)
            self._bar.set_postfix_str(f"loss={losses[-1]:.4f}, {rate:,.0f} images/s", refresh=False)
            self._bar.update(len(losses))

    def write_line(self, step: int, **values: float) -> None:
        """A line of the log: the mean loss since the last one, and ``values``."""
        seconds = time.perf_counter() - self._since
        line = {
            "step": step,
            "samples": step * self._config.batch_size,
            "loss": math.fsum(self.losses) / len(self.losses),
            **values,
            "images_per_second": round(self._images / max(seconds, 1e-9), 1),
        }
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._log.write(json.dumps(finite, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "samples"):
                    self._board.add_scalar(name, value, step)
        self.losses = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """After something that is no training: the rate is of the steps alone."""
        self._images, self._since = 0, time.perf_counter()

    def show_samples(self, step: int, images: Tensor) -> None:
        """A picture of samples, uint8 [N, C, H, W]."""
        folder = self._out / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{folder_name(step)}.png"
        write_bytes(path, grid(images))
        if self._board is not None:
            self._board.add_image("samples", read_png(path).numpy(), step)

    def close(self) -> None:
        for part in (self._log, self._board, self._bar):
            if part is not None:
                with contextlib.suppress(OSError):  # of a full disk, which was told already
                    part.close()

    def _forget_after(self, step: int) -> None:
        path = self._out / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except _DAMAGED:
                continue
        write_bytes(path, b"".join(kept))

    def _tensorboard(self, step: int) -> Any:
        if not self._config.output.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("TensorBoard is not installed: losses go to log.jsonl alone")
            return None
        return SummaryWriter(str(self._out / "tensorboard"), purge_step=step + 1)

    def _progress_bar(self, step: int) -> Any:
        if self._quiet:
            return None
        from tqdm.auto import tqdm

        return tqdm(
            total=self._config.steps,
            initial=step,
            desc="training",
            unit="step",
            mininterval=1.0,
            dynamic_ncols=True,
        )
