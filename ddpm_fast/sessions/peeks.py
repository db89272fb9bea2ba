"""Samples seen while they are drawn: the state after a step, for who asked before it.

A step of which somebody wants to see something writes x̂₀ beside the state; the others do as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..sampling import SampleStep

if TYPE_CHECKING:
    from .flight import Flyer

Seen = dict["Flyer", tuple[int, SampleStep | Exception]]  # and how many asked before the step


def asked(flyers: Sequence[Flyer]) -> dict[int, int]:
    """How many want to see the step that begins, by the places of whose they want to see."""
    return {i: len(flyer.peeks) for i, flyer in enumerate(flyers) if flyer.peeks}


def look(flyers: Sequence[Flyer], watched: Mapping[int, int], x: Tensor, x0: Tensor) -> Seen:
    """What is to be seen of some, of a step that has been taken and not counted yet."""
    seen: Seen = {}
    for i, count in watched.items():
        flyer = flyers[i]
        try:
            t = flyer.lane.timesteps[flyer.row]
            here, predicted = (tensor[i].to("cpu", copy=True) for tensor in (x, x0))
            seen[flyer] = count, SampleStep(flyer.row, t, here, predicted)
        except Exception as error:  # no memory, say: that ends the look, not the sample
            seen[flyer] = count, error
    return seen


def show(seen: Seen, failed: Sequence[tuple[Flyer, Exception]]) -> None:
    """Tells who asked; those of samples that failed at the step learn it with the handle."""
    lost = {flyer for flyer, _ in failed}
    for flyer, (count, step) in seen.items():
        if flyer not in lost:
            _tell(flyer, count, step)


def end(handle: Any) -> None:
    """Tells who still asks when a handle has an end: the image, or why there is none."""
    flyer = handle._flyer
    count = len(flyer.peeks)
    if not count:
        return
    if handle.cancelled():
        _tell(flyer, count, None)
    elif (error := Future.exception(handle)) is not None:
        _tell(flyer, count, error)
    else:
        image = Future.result(handle).to("cpu", copy=True)
        _tell(flyer, count, SampleStep(handle.num_steps - 1, handle.last_t, image, image.clone()))


def _tell(flyer: Flyer, count: int, step: SampleStep | BaseException | None) -> None:
    for left in reversed(range(count)):  # who is told may ask again at once
        with contextlib.suppress(IndexError, InvalidStateError):  # another thread, or given up
            peek = flyer.peeks.popleft()
            if step is None:
                peek.cancel()
            elif isinstance(step, BaseException):
                peek.set_exception(step)
            else:
                peek.set_result(_copied(step) if left else step)


def _copied(step: SampleStep) -> SampleStep:
    """For all but the last that is told: each may change his own at once."""
    return replace(step, x=step.x.clone(), x0=step.x0.clone())
