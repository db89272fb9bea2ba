"""Samples at different steps in one batch: what a session computes, without its threads.

The kernels read a step index a sample, and noise has an address: which samples share a batch is
seen by the model alone, which computes each of them as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import conditioning
from .engine import mixed_step
from .lanes import Lane, Lanes
from .ops.randn import randn
from .sampling import nan_error
from .stepping import NO_NAN, Stepper, backend_of

if TYPE_CHECKING:
    from .sampler import Sampler

_AHEAD = 2  # steps that the host may be before a GPU: enough to keep it busy, few for who joins


@dataclass(eq=False)
class Flyer:
    """A sample under way.

    Attributes:
        seed: in [0, 2^64).
        sample_id: in [0, 2^63).
        num_steps: of its trajectory; None: the sampler's.
        kwargs, uncond_kwargs: of its model calls.
        guidance_scale: where there is guidance.
        row: the next step.
        x: [C, …], its state before it joins; None: noise.
        given: the event behind which its arguments lie on a GPU.
    """

    seed: int
    sample_id: int
    num_steps: int | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    uncond_kwargs: dict[str, Any] | None = None
    guidance_scale: float | None = None
    row: int = 0
    x: Tensor | None = None
    given: Any = None
    lane: Lane = field(init=False)
    signature: Hashable = field(init=False)  # of what it may share a batch with

    def __post_init__(self) -> None:
        # Those who ask may change their containers afterwards
        try:
            self.kwargs = conditioning.copied(self.kwargs)
            self.uncond_kwargs = conditioning.copied(self.uncond_kwargs)
        except RecursionError:
            raise ValueError(
                "model_kwargs or uncond_kwargs hold themselves, or are nested too deeply"
            ) from None
        self.signature = conditioning.signature((self.kwargs, self.uncond_kwargs))


@dataclass(frozen=True)
class Landed:
    """What became of a sample: [C, …] float32, or why not."""

    flyer: Flyer
    result: Tensor | Exception


class Flight:
    """The samples that are under way; for one thread at a time.

    Args:
        sampler: how they are drawn.
        shape: [C, …] of one.
        max_batch: of them, at most.
    """

    def __init__(self, sampler: Sampler, shape: Sequence[int], max_batch: int) -> None:
        self.sampler, self.shape, self.max_batch = sampler, list(shape), max_batch
        self.lanes = Lanes(sampler, [max_batch, *shape])
        self.device = self.lanes.device
        self._lands_late = self.device.type == "cuda"  # the host is ahead of it
        self._groups: dict[Hashable, Group] = {}
        self._landing: deque[tuple[Any, list[tuple[Flyer, Tensor]], Tensor]] = deque()
        self._taken: deque[Any] = deque()

    @property
    def flyers(self) -> list[Flyer]:
        return [flyer for group in self._groups.values() for flyer in group.flyers]

    @property
    def room(self) -> int:
        """For how many more."""
        return self.max_batch - sum(len(group.flyers) for group in self._groups.values())

    @property
    def busy(self) -> bool:
        return bool(self._groups or self._landing)

    def join(self, flyers: Iterable[Flyer]) -> list[Landed]:
        """Takes more, up to :attr:`room`; those that cannot be drawn land at once."""
        newcomers: dict[Hashable, list[Flyer]] = {}
        landed = []
        if not self.busy:
            try:
                self.lanes.renew()
            except Exception as error:  # there is no plan of the model as it is now, say
                return [Landed(flyer, error) for flyer in flyers]
        for flyer in flyers:
            try:
                flyer.lane = self.lanes.take(flyer.num_steps)
            except Exception as error:
                landed.append(Landed(flyer, error))
                continue
            try:
                newcomers.setdefault((flyer.lane.family, flyer.signature), []).append(flyer)
            except Exception as error:  # of an argument's own comparison
                self.lanes.give_back(flyer.lane)
                landed.append(Landed(flyer, error))
        for kind, some in newcomers.items():
            try:
                group = self._groups.get(kind) or Group(self)
                group.join(some)
            except Exception as error:  # no memory, say
                for flyer in some:
                    self.lanes.give_back(flyer.lane)
                landed += [Landed(flyer, error) for flyer in some]
            else:
                self._groups[kind] = group
        return landed

    def drop(self, flyers: Iterable[Flyer]) -> None:
        """Forgets samples."""
        unwanted = set(flyers)
        for kind, group in list(self._groups.items()):
            group.leave([i for i, flyer in enumerate(group.flyers) if flyer in unwanted])
            self._forget_if_empty(kind)

    def state_of(self, flyer: Flyer) -> Tensor | None:
        """[C, …] before its next step, on the CPU; None where it is noise yet to be drawn."""
        for group in self._groups.values():
            if flyer in group.flyers:
                return group.x[group.flyers.index(flyer)].to("cpu", copy=True)
        return flyer.x  # that it came with, or none

    @torch.no_grad()
    def step(self, wait: bool = True) -> list[Landed]:
        """One step of all. On a GPU samples land when it has computed them, at a later step; it is
        waited for where nothing else is under way, and ``wait``."""
        landed = []
        for kind, group in list(self._groups.items()):
            landed += group.step()
            done = [i for i, flyer in enumerate(group.flyers) if flyer.row == len(flyer.lane)]
            if done:
                landed += self._land([(group.flyers[i], group.x[i].clone()) for i in done])
                group.leave(done)
            self._forget_if_empty(kind)
        if self._lands_late:
            self._pace()
        landed += self._arrived(wait=wait and not self._groups)
        return landed

    def _forget_if_empty(self, kind: Hashable) -> None:
        if not self._groups[kind].flyers:
            del self._groups[kind]

    def _land(self, done: list[tuple[Flyer, Tensor]]) -> list[Landed]:
        """Samples that have taken all their steps, and results that are theirs."""
        if not self._lands_late:
            return [Landed(flyer, x) for flyer, x in done]
        broken = torch.stack([x.isnan().any() for _, x in done])
        told = torch.empty(len(done), dtype=torch.bool, pin_memory=True)
        told.copy_(broken, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._landing.append((event, done, told))
        return []

    def settle(self) -> list[Landed]:
        """What has not landed yet though all its steps are taken, waited for."""
        return self._arrived(wait=True)

    def _arrived(self, wait: bool) -> list[Landed]:
        """What a GPU has finished."""
        landed = []
        while self._landing:
            event, done, broken = self._landing[0]
            if wait:
                event.synchronize()
            elif not event.query():
                break
            self._landing.popleft()
            for (flyer, x), bad in zip(done, broken.tolist(), strict=True):
                landed.append(Landed(flyer, nan_error(None, None) if bad else x))
        return landed

    def _pace(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._taken.append(event)
        if len(self._taken) > _AHEAD:
            self._taken.popleft().synchronize()


class Group:
    """Samples that share calls of the model, in the first rows of its tensors. These grow as they
    come: there may be as many groups as samples."""

    def __init__(self, flight: Flight) -> None:
        self._flight, self._lanes = flight, flight.lanes
        device = flight.device
        self.flyers: list[Flyer] = []
        self.x = torch.empty([0, *flight.shape], device=device)
        lowp = flight.lanes.low_precision
        self._lowp = None if lowp is None else torch.empty_like(self.x, dtype=lowp)
        self._steps, self._seeds, self._ids = (
            torch.empty(0, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._scales = torch.empty(0, device=device)
        self._nan_step = torch.full((1,), NO_NAN, dtype=torch.int32, device=device)
        self._batch: Batch | None = None
        self._stepper = Stepper(flight.sampler, flight.lanes.table)

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
        self._batch = None

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
            self._batch = None

    def step(self) -> list[Landed]:
        """One step of each, and those that failed at it. Where a call of the model fails, each
        sample takes the step alone, so that one's mistake is not the others'."""
        failed: dict[int, Exception] = {}
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
        self._find_nans(failed)
        for i, flyer in enumerate(self.flyers):
            flyer.row += i not in failed
        landed = [Landed(self.flyers[i], error) for i, error in failed.items()]
        if failed:
            self.leave(failed)
        return landed

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
        self._stepper(
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
            return_x0=False,
            nan_step=self._nan_step,
            where="in a session's batch",
        )
        batch.steps.add_(1)

    def _versions(self) -> list[int]:
        """That change whenever the states are written."""
        return [x._version for x in (self.x, self._lowp) if x is not None]

    def _find_nans(self, failed: dict[int, Exception]) -> None:
        """On the host, where looking costs nothing; on a GPU when a sample lands."""
        if self.x.device.type == "cuda" or int(self._nan_step) == NO_NAN:
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
