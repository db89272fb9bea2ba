"""Samples at different steps in one batch: what a session computes, without its threads.

The kernels read a step index a sample, and noise has an address: which samples share a batch is
seen by the model alone, which computes each of them as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sampling import SampleStep, nan_error
from . import conditioning, peeks
from .group import Group
from .lanes import Lane, Lanes

if TYPE_CHECKING:
    from ..sampler import Sampler

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
        peeks: of those who want to see its next step; who has a handle adds to them at any time.
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
    peeks: deque[Future[SampleStep]] = field(init=False, default_factory=deque)

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

    def release(self) -> None:
        """Its arguments, when no step needs them any more: handles may be kept for long."""
        self.kwargs, self.uncond_kwargs, self.given = {}, None, None


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
    def landing(self) -> bool:
        """Whether some have taken all their steps, and a GPU has not told of it yet."""
        return bool(self._landing)

    @property
    def only_lands(self) -> bool:
        """Whether nothing is left to do but to wait for that."""
        return bool(self._landing) and not self._groups

    @property
    def busy(self) -> bool:
        return bool(self._groups or self._landing)

    def description(self) -> dict[str, str]:
        """Of what draws these samples, or the next if there are none, for a saved state.

        Raises:
            TypeError, ValueError, MemoryError: the model cannot be sampled from as it is now; its
                weights were changed while samples of its plan are under way.
        """
        if not self.busy:
            self.lanes.renew()
        return {"shape": str(self.shape), **self.lanes.description()}

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
        for flyer in unwanted:
            flyer.release()

    def state_of(self, flyer: Flyer) -> tuple[int, Tensor | None]:
        """Its next row and [C, …] before it, on the CPU; None where it is noise yet to be drawn."""
        for group in self._groups.values():
            if flyer in group.flyers:
                return flyer.row, group.x[group.flyers.index(flyer)].to("cpu", copy=True)
        for _, done, _ in self._landing:
            for other, x in done:
                if other is flyer:
                    x = x.to("cpu", copy=True)
                    return (0, None) if bool(x.isnan().any()) else (flyer.row, x)
        return (0, None) if flyer.x is None else (flyer.row, flyer.x)  # that it came with

    def step(self, wait: bool = True) -> list[Landed]:
        """One step of all. On a GPU samples land when it has computed them, at a later step; it is
        waited for where nothing else is under way, and ``wait``."""
        if torch.is_grad_enabled():  # not in a session's thread; to turn it off takes microseconds
            with torch.no_grad():
                return self.step(wait)
        landed: list[Landed] = []
        for kind, group in list(self._groups.items()):
            if failed := group.step():
                landed += [Landed(flyer, error) for flyer, error in failed]
            if done := group.done():
                flyers = [group.flyers[i] for i in done]
                try:
                    landed += self._land([(group.flyers[i], group.x[i].clone()) for i in done])
                except Exception as error:  # no memory, say
                    landed += [Landed(flyer, error) for flyer in flyers]
                group.leave(done)
            peeks.show(group.seen, failed)
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
