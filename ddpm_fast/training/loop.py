"""A run from its first step to its last, or to what stops it."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path

from .checkpoints import Snapshot, folder_name, write_checkpoint
from .dataset import ImageData
from .errors import FailedElsewhere, RunError
from .images import NoReadableImageError, UnreadableImage, shown
from .interrupts import Interrupts
from .journal import Journal
from .loader import Batch, Loader
from .trainer import Trainer
from .world import World, first_line, lost_peers


class Loop:
    """Steps, and what is due between them: lines of the log, samples, checkpoints.

    Args:
        trainer: at the step that the run goes on from.
        data: what it is trained on.
        out: the run's folder, locked.
        start: what the trainer was restored from; None at the beginning.
        quiet: no bar and no messages but warnings.
    """

    def __init__(
        self, trainer: Trainer, data: ImageData, out: Path, start: Snapshot | None, quiet: bool
    ) -> None:
        self._trainer, self._data = trainer, data
        self._config, self._world = trainer.config, trainer.world
        self._checkpoints = out / "checkpoints"
        self._saved: int | None = None if start is None else start.step
        # A GPU is waited for only where something is due.
        self.reads_every_step = self._world.device.type == "cpu"
        self._last: tuple[float, float] = (math.nan, math.nan)
        self._journal: Journal | None = None

        def open_journal() -> None:
            losses = [] if start is None else start.state["losses"]
            try:
                self._journal = Journal(out, self._config, trainer.step_count, losses, quiet)
            except OSError as error:
                raise RunError(
                    f"cannot write the log in {shown(out)}: {_reason(error)}; {self._last_good()}"
                ) from error

        self._world.share(open_journal)

    def run(self) -> int:
        """Trains to the last step; the number of the signal that stopped it before, or 0.

        Raises:
            RunError: what stops a run: a loss that is not finite, a disk that is full, an image
                that cannot be read. The last checkpoint stays good.
        """
        trainer, config = self._trainer, self._config
        loader = Loader(
            self._data,
            trainer.positions(),
            seed=config.seed,
            flip=config.data.flip,
            pin_memory=self._world.device.type == "cuda",
        )
        try:
            with loader, Interrupts(self._world.first) as interrupts:
                if self._saved is None:
                    self._save()
                batches = iter(loader)
                while trainer.step_count < config.steps:
                    stopped = self.step(batches, interrupts)
                    if stopped:
                        self._save()
                        return stopped
                if self._saved != trainer.step_count:
                    self._save()
        except OSError as error:
            raise RunError(f"{_reason(error)}; {self._last_good()}") from error
        except UnreadableImage as error:
            raise RunError(
                f"{error} (--on-bad-image skip takes another for it); {self._last_good()}"
            ) from error
        except NoReadableImageError as error:
            raise RunError(f"{error}; {self._last_good()}") from error
        except FailedElsewhere as error:
            if error.__cause__ is None:  # the process that failed says it all
                raise
            raise FailedElsewhere(f"{error}; {self._last_good()}", error.status) from error
        except (RuntimeError, MemoryError) as error:
            known = explained(error, self._world)
            if known is None:
                raise
            raise type(known)(f"{known}; {self._last_good()}", known.status) from error
        finally:
            self.close()
        return 0

    def close(self) -> None:
        """Closes the log and the bar."""
        if self._journal is not None:
            self._journal.close()

    def step(self, batches: Iterator[Batch], interrupts: Interrupts) -> int:
        """A step and what is due after it; the number of a signal that came, or 0."""
        trainer, output = self._trainer, self._config.output
        trainer.step(batches)
        step = trainer.step_count
        last = step == self._config.steps
        log, save = step % output.log_every == 0 or last, step % output.checkpoint_every == 0
        read = trainer.read() if log or save or self.reads_every_step else []
        stopped = self._exchange(read, interrupts.signal)
        if stopped and trainer.pending:
            self._exchange(trainer.read(), 0)
        if log and self._journal is not None:
            self._journal.write_line(
                step,
                grad_norm=self._last[1],
                learning_rate=trainer.learning_rate,
                **({"bad_images": len(self._data.bad_images)} if self._data.bad_images else {}),
            )
        if output.sample_every and (step % output.sample_every == 0 or last):
            self._show_samples(step)
        if save and not stopped:
            self._save()
        return stopped

    def _exchange(self, read: list[tuple[int, float, float]], received: int) -> int:
        """The losses of all processes, checked and noted; the signal that any of them got."""
        totals = self._world.totals([float(received), *(loss for _, loss, _ in read)])
        losses = [total / self._world.size for total in totals[1:]]
        for (step, _, norm), loss in zip(read, losses, strict=True):
            # With float16, gradients overflow now and then: the scaler passes over such a step.
            if not math.isfinite(loss) or (
                not math.isfinite(norm) and self._config.precision != "fp16"
            ):
                raise self._not_finite(step, loss, norm)
            self._last = (loss, norm)
        if losses and self._journal is not None:
            self._journal.note(losses)
        return received or _signal_of(totals[0])

    def _not_finite(self, step: int, loss: float, norm: float) -> RunError:
        """Which step, and which samples as far as this process has seen them."""
        if not self._world.first:
            return FailedElsewhere("the loss is not finite")
        size = self._config.batch_size
        what = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        )
        ids = f"sample ids {(step - 1) * size} … {step * size - 1}"
        if step == self._trainer.step_count and self._trainer.per_sample:
            first = (step - 1) * size
            bad: list[int] = []
            for part in self._trainer.per_sample:
                bad += [first + i for i in (~part.isfinite()).nonzero().flatten().tolist()]
                first += len(part)
            if bad:
                more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
                ids += f", of them not finite: {', '.join(map(str, bad[:8]))}{more}"
        return RunError(f"{what} at step {step} ({ids}); {self._last_good()}")

    def _show_samples(self, step: int) -> None:
        if self._journal is not None or self._trainer.sharded:
            try:
                images = self._trainer.sample()
            except FloatingPointError as error:
                if self._journal is not None:
                    self._journal.warn(f"no samples at step {step}: {error}")
                return
            if self._journal is not None:
                self._journal.show_samples(step, images)
                self._journal.restart_clock()

    def _save(self) -> None:
        snapshot = self._trainer.snapshot()

        def write() -> None:
            assert snapshot is not None
            assert self._journal is not None
            snapshot.state["losses"] = self._journal.losses
            snapshot.state["num_images"] = len(self._data)
            snapshot.state["class_names"] = self._data.class_names
            snapshot.state["files_sha256"] = self._data.files_sha256
            step = snapshot.step
            try:
                write_checkpoint(self._checkpoints, snapshot, self._config.output.keep)
            except OSError as error:
                raise RunError(
                    f"cannot write the checkpoint of step {step} to {self._checkpoints}: "
                    f"{_reason(error)}; {self._last_good()}"
                ) from error
            self._journal.restart_clock()

        self._world.share(write)
        self._saved = self._trainer.step_count

    def _last_good(self) -> str:
        if self._saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self._checkpoints / folder_name(self._saved)}"


def _signal_of(total: float) -> int:
    """Of another process's: SIGTERM unless all that came can have been SIGINT."""
    if not total:
        return 0
    return signal.SIGTERM if total >= signal.SIGTERM else signal.SIGINT


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def explained(error: BaseException, world: World | None) -> RunError | None:
    """An error of torch's as one that a person can act on; None for any other."""
    if world is not None and world.size > 1 and lost_peers(error):
        return FailedElsewhere(f"process {world.rank} lost the others: {first_line(error)}")
    if "DataLoader worker" in str(error) and isinstance(error, RuntimeError):
        return RunError(f"a process that reads images has ended: {first_line(error)}")
    if "out of memory" in str(error) and isinstance(error, (RuntimeError, MemoryError)):
        return RunError(
            f"out of memory: {str(error).splitlines()[0]} (--grad-accum and activation "
            "checkpointing take less)"
        )
    return None
