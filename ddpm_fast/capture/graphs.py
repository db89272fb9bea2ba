"""Which trajectories of a Sampler are played from captured steps, and the steps that it keeps.

Nothing but speed depends on it: what cannot be captured goes step by step, with one warning.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..callers import place_of, warn_caller
from ..nn.memory import within_memory
from ..ops.checks import is_eager
from .captured import CapturedStep
from .key import Key, Known, UnsuitedError, holders_of, key_of
from .recorder import RECORDERS
from .rehearsal import UncapturableError

if TYPE_CHECKING:
    from ..sampling import Run

# Each holds the memory of a step: shapes, with and without x̂₀, that alternate.
KEPT = 4
# A capture takes the time of some eight steps that are not captured, and a replay a tenth of one
# where launches are what takes the time: trajectories of one kind get one when they come to more.
WORTH = 16
# A look at whether a captured step is as it was takes one that is not captured.
SHORT = 3
# Of a recording. More save the host a launch for each; not measured on a GPU yet.
STEPS = 1
# Models and functions that cannot be captured.
REMEMBERED = 16
# One capture at a time: PyTorch's allocator and recorder.py's stream take no more.
_capturing = threading.Lock()

Again = Literal["never", "once", "with less"]
Part = tuple[object, object]  # the functions that a step calls: the model, denoised_fn


class Graphs:
    """The captured steps of one sampler, used by any number of threads. Copies have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, CapturedStep | None] = OrderedDict()  # None: no memory for it
        self._steps: OrderedDict[int, int] = OrderedDict()  # that were asked for, by a key's hash
        # What cannot be captured, and models of which that was said
        self._refused: deque[tuple[Known, Known]] = deque(maxlen=REMEMBERED)
        self._told: deque[Known] = deque(maxlen=REMEMBERED)

    @contextlib.contextmanager
    def of(self, run: Run, every_state: bool) -> Iterator[CapturedStep | None]:
        """The captured step that a trajectory can be played from, by nobody else meanwhile; None
        where it goes step by step."""
        found = self._find(run, every_state)
        try:
            yield found
        finally:
            if found is not None:
                found.release()

    def _find(self, run: Run, every_state: bool) -> CapturedStep | None:
        kind = run.x.device.type
        if run.sampler.graph == "off" or kind not in RECORDERS:
            return None
        if not run.rows or not run.x.numel() or not is_eager(run.x):
            return None
        part = _part(run)
        missing = RECORDERS[kind](run.x.device).lacks()
        if missing:
            self._tell(part, f"PyTorch {torch.__version__} has no {missing}")
            return None
        try:
            key = key_of(run, every_state, STEPS, holders_of(run))
        except UnsuitedError as error:
            if str(error):
                self._tell(part, f"its arguments cannot be captured: {error}")
            return None
        with self._lock:
            if any(a.is_of(part[0]) and b.is_of(part[1]) for a, b in self._refused):
                return None
            # Of a model or weights that went there is nothing to come back to
            for other in list(self._kept):
                if (other.model, other.weights) != (key.model, key.weights):
                    del self._kept[other]
            if key in self._kept:
                self._kept.move_to_end(key)
            elif not self._is_worth(key, len(run.rows)):
                return None
            if key.opaque and len(run.rows) < SHORT:
                return None
            found = self._kept.get(key)
            if key in self._kept and found is None:
                return None
        if found is not None:
            if not found.lock.acquire(blocking=False):
                return None  # a thread has it, or a stream that has not ended
            if self._still_fits(found, run):
                return found
            with self._lock:
                if not self._is_worth(key, len(run.rows)):
                    return None
        return self._captured(run, key, every_state, part)

    def _is_worth(self, key: Key, steps: int) -> bool:
        asked = self._steps.pop(hash(key), 0) + steps
        self._steps[hash(key)] = asked
        if len(self._steps) > 16 * KEPT:
            self._steps.popitem(last=False)
        return asked >= WORTH

    def _still_fits(self, found: CapturedStep, run: Run) -> bool:
        """Whether the locked step is the trajectory's; else it is dropped."""
        fits = False
        try:
            fits = found.fits(run)
        finally:
            if not fits:
                found.release()
                with self._lock:
                    self._steps.pop(hash(found.key), None)
                    if self._kept.get(found.key) is found:
                        del self._kept[found.key]
        return fits

    def _captured(self, run: Run, key: Key, every_state: bool, part: Part) -> CapturedStep | None:
        """One made for a trajectory, locked for it; None with a warning where that fails."""
        if not _capturing.acquire(blocking=False):
            return None
        try:
            with self._lock:
                while len(self._kept) >= KEPT:  # first: more would need more memory
                    self._kept.popitem(last=False)
            found, why, again = _attempt(run, key, every_state)
            if again == "once" or (again == "with less" and self._kept):
                with self._lock:
                    if again == "with less":
                        self._kept.clear()
                with contextlib.suppress(Exception):  # the loop meets what is not of the capture
                    found, why, again = _attempt(run, key, every_state)
        finally:
            _capturing.release()
        if found is not None:
            found.lock.acquire()
        with self._lock:
            if found is None and again != "with less":
                self._refused.append((Known(part[0]), Known(part[1])))
            else:
                self._kept[key] = found
        if why:
            self._tell(part, why)
        return found

    def _tell(self, part: Part, why: str) -> None:
        """Once for each model, to who samples."""
        with self._lock:
            if any(known.is_of(part[0]) for known in self._told):
                return
            self._told.append(Known(part[0]))
        warn_caller(f'sampling step by step, without a graph: {why}; graph="off" silences this')

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()


def _part(run: Run) -> Part:
    """Of which it is told that it cannot be captured."""
    model = run.sampler.model if run.plan is None else run.plan.family
    return model, run.sampler.denoised_fn


def _attempt(run: Run, key: Key, every_state: bool) -> tuple[CapturedStep | None, str, Again]:
    """A captured step, or why there is none and what might help. Nothing of it is kept then."""
    made: list[CapturedStep] = []

    def make() -> None:
        recorder = RECORDERS[run.x.device.type](run.x.device)
        step = CapturedStep(run, key, every_state, STEPS, recorder)
        step.warm_up(run)
        made.append(step)
        step.record(run)
        step.compare(run)

    again: Again = "never"
    try:
        within_memory("a captured step", make)
        return made[0], "", again
    except MemoryError as error:
        return None, str(error), "with less"
    except UncapturableError as error:
        said, place = str(error), place_of(error)
    except Exception as error:
        if not made:
            raise  # of the model's, which comes without a capture, too
        # What somebody else did meanwhile may have broken it
        said, place, again = str(error).split("\n")[0], place_of(error), "once"
        said = f"{type(error).__name__}: {said}"
    said = f"{said} ({place})" if place else said
    return None, f"the model's step cannot be captured: {said}", again
