"""Samples that share calls of the model: the tensors of a batch, and a step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import mixed_step
from ..ops.randn import randn
from ..sampling import nan_error
from ..stepping import NO_NAN, Stepper, backend_of
from . import conditioning, peeks

if TYPE_CHECKING:
    from .flight import Flight, Flyer


class Group:
    """Samples that share calls of the model, in the first rows of its tensors. These grow as they
    come: there may be as many groups as samples."""

    def __init__(self, flight: Flight) -> None:
        self._flight, self._lanes = flight, flight.lanes
        device = flight.device
        self._on_gpu = device.type == "cuda"
        self.flyers: list[Flyer] = []
        self.x = torch.empty([0, *flight.shape], device=device)
        lowp = flight.lanes.low_precision
        self._lowp = None if lowp is None else torch.empty_like(self.x, dtype=lowp)
        self._steps, self._seeds, self._ids = (
            torch.empty(0, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._scales = torch.empty(0, device=device)
        self._nan_step = torch.full((1,), NO_NAN, dtype=torch.int32, device=device)
        # Read at each step, where it lies on the host: by NumPy in a tenth of the time
        self._seen: Any = self._nan_step.numpy() if device.type == "cpu" else self._nan_step
        self._batch: Batch | None = None
        self._left = 0  # steps of all that nobody lands before; 0 if it was not looked
        self._stepper = Stepper(flight.sampler, flight.lanes.table)
        self.seen: peeks.Seen = {}  # at the last step, of those whose next step somebody wanted

    def join(self, flyers: Sequence[Flyer]) -> None:
        n, count = len(self.flyers), len(flyers)
        place = slice(n, n + count)
        self._hold(n + count)
        for flyer in flyers:
            if flyer.given is not None:
                flyer.given.wait()
                # Its memory is another stream's, who must not give it away before it is read here
                for tensor in conditioning.tensors((flyer.kwargs, flyer.uncond_kwargs)):
                    if tensor.is_cuda:
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
        seeds = [flyer.seed - (flyer.seed >> 63 << 64) for flyer in flyers]
        _write(self._seeds[place], seeds)
        _write(self._ids[place], [flyer.sample_id for flyer in flyers])
        _write(self._scales[place], [flyer.guidance_scale or 0.0 for flyer in flyers])
        with backend_of(self._flight.sampler):
            self.x[place] = randn(
                [count, *self._flight.shape],
                seed=self._seeds[place],
                sample_ids=self._ids[place],
                device=self.x.device,
            )
        for i, flyer in enumerate(flyers, n):
            if flyer.x is not None:
                self.x[i] = flyer.x
                flyer.x = None
        if self._lowp is not None:
            self._lowp[place] = self.x[place]
        self.flyers += flyers
        self._batch, self._left = None, 0

    def _hold(self, count: int) -> None:
        """Makes room for so many, twice as many as before at least."""
        capacity = self.x.shape[0]
        if count > capacity:
            capacity = min(max(count, 2 * capacity), self._flight.max_batch)
            lowp = None if self._lowp is None else _resized(self._lowp, capacity)
            mine = (self.x, self._steps, self._seeds, self._ids, self._scales)
            larger = [_resized(tensor, capacity) for tensor in mine]
            self.x, self._steps, self._seeds, self._ids, self._scales = larger
            self._lowp = lowp

    def leave(self, places: Iterable[int]) -> None:
        """The last ones take the places that become free."""
        for i in sorted(places, reverse=True):
            flyer = self.flyers[i]
            self._lanes.give_back(flyer.lane)
            del flyer.lane, flyer.signature  # a handle that is kept keeps no plan alive
            last = self.flyers.pop()
            if i < len(self.flyers):
                self.flyers[i] = last
                for tensor in (self.x, self._lowp, self._seeds, self._ids, self._scales):
                    if tensor is not None:
                        tensor[i] = tensor[len(self.flyers)]
            self._batch, self._left = None, 0

    def done(self) -> list[int]:
        """Places of those that have taken all their steps."""
        if self._left:
            return []
        left = [len(flyer.lane) - flyer.row for flyer in self.flyers]
        self._left = min(left, default=0)
        return [i for i, steps in enumerate(left) if not steps]

    def step(self) -> list[tuple[Flyer, Exception]]:
        """One step of each, and those that failed at it. Where a call of the model fails, each
        sample takes the step alone, so that one's mistake is not the others'."""
        failed: dict[int, Exception] = {}
        self.seen = {}
        before = self._versions()
        try:
            if self._batch is None or self._batch.table is not self._lanes.table:
                self._batch = self._of(range(len(self.flyers)))
            self._take(self._batch)
        except Exception as error:
            self._batch = None  # each counts its own steps
            if len(self.flyers) == 1 or self._versions() != before:
                # Nothing is left to go on from where the model wrote into the states
                failed = dict.fromkeys(range(len(self.flyers)), error)
            else:
                for i in range(len(self.flyers)):
                    try:
                        self._take(self._of([i]))
                    except Exception as own:
                        failed[i] = own
        try:
            self._find_nans(failed)
        except Exception as error:  # no memory to look
            failed = dict.fromkeys(range(len(self.flyers)), error)
        if not failed:
            for flyer in self.flyers:
                flyer.row += 1
            self._left -= self._left > 0
            return []
        for i, flyer in enumerate(self.flyers):
            flyer.row += i not in failed
        found = [(self.flyers[i], error) for i, error in failed.items()]
        self.leave(failed)
        return found

    def _of(self, places: Sequence[int]) -> Batch:
        """The tensors of samples that lie beside each other."""
        flyers = [self.flyers[i] for i in places]
        part = slice(places[0], places[-1] + 1)
        rows = [flyer.lane.offset + flyer.row for flyer in flyers]
        _write(self._steps[part], rows)
        guided = flyers[0].uncond_kwargs is not None
        return Batch(
            self._lanes.table,
            flyers,
            self.x[part],
            None if self._lowp is None else self._lowp[part],
            self._steps[part],
            self._seeds[part],
            self._ids[part],
            self._scales[part] if guided else None,
            conditioning.joined([flyer.kwargs for flyer in flyers]),
            conditioning.joined([flyer.uncond_kwargs for flyer in flyers]) if guided else None,
        )

    def _take(self, batch: Batch) -> None:
        self._stepper.table = batch.table
        model: Callable[..., Any]
        t: Any
        if batch.flyers[0].lane.plan is None:
            model, t = self._flight.sampler.model, self._lanes.told.index_select(0, batch.steps)
        else:
            model, t = _of_places, [(flyer.lane.plan, flyer.row) for flyer in batch.flyers]
        watched = peeks.asked(batch.flyers)
        taken = self._stepper(
            batch.x,
            batch.steps,
            model,
            t,
            seed=batch.seeds,
            sample_ids=batch.ids,
            kwargs=batch.kwargs,
            uncond_kwargs=batch.uncond_kwargs,
            guidance_scale=batch.scales,
            out=batch.x,
            out_lowp=batch.lowp,
            return_x0=bool(watched),
            nan_step=self._nan_step,
            where="in a session's batch",
        )
        if watched:
            self.seen |= peeks.look(batch.flyers, watched, *taken)
        batch.steps.add_(1)

    def _versions(self) -> tuple[int, int]:
        """That change whenever the states are written."""
        return self.x._version, 0 if self._lowp is None else self._lowp._version

    def _find_nans(self, failed: dict[int, Exception]) -> None:
        """On the host, where looking costs nothing; on a GPU when a sample lands."""
        if self._on_gpu or self._seen[0] == NO_NAN:
            return
        self._nan_step.fill_(NO_NAN)
        broken = self.x[: len(self.flyers)].flatten(1).isnan().any(1)
        for i in broken.nonzero().flatten().tolist():
            flyer = self.flyers[i]
            failed.setdefault(i, nan_error(flyer.row, flyer.lane.timesteps[flyer.row]))


@dataclass(frozen=True, eq=False)
class Batch:
    """A call of the model: flyers and their tensors, until one joins or leaves."""

    table: Any
    flyers: list[Flyer]
    x: Tensor
    lowp: Tensor | None
    steps: Tensor
    seeds: Tensor
    ids: Tensor
    scales: Tensor | None
    kwargs: dict[str, Any]
    uncond_kwargs: dict[str, Any] | None


def _of_places(x: Tensor, places: Sequence[tuple[Any, int]], **kwargs: Any) -> Tensor:
    """mixed_step in the order of a model's arguments."""
    return mixed_step(places, x, **kwargs)


def _resized(tensor: Tensor, rows: int) -> Tensor:
    """With more of them, the new ones not set."""
    larger = tensor.new_empty([rows, *tensor.shape[1:]])
    larger[: tensor.shape[0]] = tensor
    return larger


def _write(tensor: Tensor, values: Sequence[float]) -> None:
    """On a GPU without waiting for it: the host's memory is kept until it has been read."""
    on_gpu = tensor.is_cuda
    there = torch.tensor(values, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
    tensor.copy_(there, non_blocking=on_gpu)
