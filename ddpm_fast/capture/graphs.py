"""Which trajectories of a Sampler are played from captured steps, and the steps that it keeps.

Nothing but speed depends on it: what cannot be captured goes step by step, with one warning.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..callers import place_of, warn_caller
from ..nn.memory import within_memory
from ..ops.checks import is_eager
from .captured import CapturedStep
from .key import Key, Same, UnsuitedError, holders_of, key_of
from .recorder import RECORDERS
from .rehearsal import UncapturableError

if TYPE_CHECKING:
    from ..sampling import Run

# Each holds the memory of a step: shapes, with and without x̂₀, that alternate.
KEPT = 4
# A capture takes the time of some seven steps that are not captured, and a replay a tenth of one
# where launches are what takes the time: trajectories of one kind get one when they come to more.
WORTH = 16
# A look at whether a captured step is as it was takes one that is not captured.
SHORT = 3
# Of a recording. More save the host a launch for each; not measured on a GPU yet.
STEPS = 1
# One capture at a time: PyTorch's allocator and recorder.py's stream take no more.
_capturing = threading.Lock()

Part = tuple[Same, Same]  # the functions that a step calls: the model, denoised_fn


class Graphs:
    """The captured steps of one sampler, used by any number of threads. Copies have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, CapturedStep | None] = OrderedDict()  # None: no memory for it
        self._steps: OrderedDict[int, int] = OrderedDict()  # that were asked for, by a key's hash
        self._refused: list[Part] = []  # what cannot be captured
        self._told: list[Part] = []  # of which that was said

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
        try:
            key = key_of(run, every_state, STEPS, holders_of(run))
        except UnsuitedError as error:
            if str(error):
                self._tell(part, f"its arguments cannot be captured: {error}")
            return None
        with self._lock:
            if part in self._refused:
                return None
            self._forget_other_models(part)
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

    def _forget_other_models(self, part: Part) -> None:
        self._refused = [other for other in self._refused if other[0] == part[0]]
        self._told = [other for other in self._told if other[0] == part[0]]

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
            found, why, for_good = _attempt(run, key, every_state)
            if found is None and not for_good and self._kept:
                with self._lock:
                    self._kept.clear()
                found, why, for_good = _attempt(run, key, every_state)
        finally:
            _capturing.release()
        if found is not None:
            found.lock.acquire()
        with self._lock:
            if for_good:
                self._refused = [part]
            else:
                self._kept[key] = found
        if why:
            self._tell(part, why)
        return found

    def _tell(self, part: Part, why: str) -> None:
        """Once for each model, to who samples."""
        with self._lock:
            if part in self._told:
                return
            self._told = [part]
        warn_caller(f'sampling step by step, without a graph: {why}; graph="off" silences this')

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()


def _part(run: Run) -> Part:
    """Of which it is told that it cannot be captured."""
    model = run.sampler.model if run.plan is None else run.plan.family
    return Same(model), Same(run.sampler.denoised_fn)


def _attempt(run: Run, key: Key, every_state: bool) -> tuple[CapturedStep | None, str, bool]:
    """A captured step, or why there is none and whether none can be. Nothing of it is kept then."""
    made: list[CapturedStep] = []

    def make() -> None:
        recorder = RECORDERS[run.x.device.type](run.x.device)
        step = CapturedStep(run, key, every_state, STEPS, recorder)
        step.warm_up(run)
        made.append(step)
        step.record(run)
        step.compare(run)

    try:
        within_memory("a captured step", make)
        return made[0], "", False
    except MemoryError as error:
        return None, str(error), False
    except Exception as error:
        if not made:
            raise  # of the model's, which comes without a capture, too
        said = str(error).split("\n")[0]
        if not isinstance(error, UncapturableError):
            said = f"{type(error).__name__}: {said}"
        place = place_of(error)
        said = f"{said} ({place})" if place else said
    return None, f"the model's step cannot be captured: {said}", True
