"""In-flight batching: a Sampler that draws for many who ask at any time.

What continuous batching is to language models (Yu et al. 2022, Orca), for diffusion: the batch is
put together anew at every step. A thread of the session's own takes the steps; whoever asks gets a
handle, in any thread or event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..callers import warn_caller
from ..ops.checks import as_int, finite
from ..schedule import integer
from . import saved
from .book import Book, End
from .flight import Flight, Flyer
from .handle import Handle
from .threads import Settings, release_threads
from .worker import Worker

if TYPE_CHECKING:
    from ..sampler import Sampler


class Session:
    """Draws samples that are asked for at any time; made by ``Sampler.session``.

    Those that are at different steps share calls of the model, up to ``max_batch`` of them; who
    comes first is served first. Each is what ``sampler.sample([1, *shape], …)`` draws, to the
    rounding of the model's arithmetic in a batch of another size. The model is called by a thread
    of the session's own; nothing else may change it meanwhile. Of a plan changed weights are seen
    when no sample is under way; a model that is called itself computes with those that it has.

    Samples whose ``model_kwargs`` differ in more than the values of tensors that are one sample's,
    [1, …], are computed in calls of their own. If a call of the model fails, each of its samples
    takes that step alone, and those that fail alone get the exception.

    As a context manager it waits at the end for what was asked for, or gives it up if the block
    ends by an exception. Iterating, plainly or in an event loop, gives finished handles in the
    order in which they finish, until nothing is left to wait for; without those whose result was
    taken before. Those that nobody has asked for are kept for it: until somebody iterates the last
    ``max_batch + max_waiting``, then all.

    Args:
        sampler, shape, max_batch, max_waiting: as of ``Sampler.session``.

    >>> sampler = Sampler(lambda x, t: torch.zeros_like(x), NoiseSchedule.linear(), num_steps=4)
    >>> with sampler.session([3, 8, 8], max_batch=8) as session:
    ...     handles = [session.submit(seed=7, sample_id=i) for i in range(12)]
    ...     handles[11].result().shape
    torch.Size([3, 8, 8])
    """

    def __init__(
        self, sampler: Sampler, shape: Sequence[int], max_batch: int, max_waiting: int
    ) -> None:
        if isinstance(shape, (int, str)):
            raise TypeError(f"shape must be [C, …], of one sample; got {shape!r}")
        shape = [integer("shape", size) for size in shape]
        if not shape or min(shape) < 0:
            raise ValueError(f"shape must be [C, …], of one sample; got {shape}")
        self.max_batch = _at_least("max_batch", max_batch, 1)
        self.max_waiting = _at_least("max_waiting", max_waiting, 0)
        self._sampler = sampler._as_it_is()
        self._flight = Flight(self._sampler, shape, self.max_batch)
        self._settings = Settings(self._flight.device)
        self._book = Book(self.max_batch, self.max_waiting)
        self._worker = Worker(self._flight, self._book, self._settings)

    @property
    def waiting(self) -> int:
        """How many samples wait for a place in the batch."""
        return len(self._book.waiting)

    @property
    def running(self) -> int:
        """How many are in the batch."""
        return len(self._book.running)

    def submit(
        self,
        *,
        seed: int = 0,
        sample_id: int = 0,
        num_steps: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
    ) -> Handle:
        """Asks for a sample, and returns at once.

        Args:
            seed: in [0, 2^64).
            sample_id: in [0, 2^63).
            num_steps: of its trajectory, with the sampler's spacing; the sampler's own if None.
            model_kwargs: as ``sample([1, …])`` takes them. Tensors are not copied: they have to
                stay as they are until the sample is finished.
            uncond_kwargs: of the unconditional calls.
            guidance_scale: the sampler's if None; with one or the other uncond_kwargs are needed.

        Raises:
            TypeError, ValueError: an argument out of its range.
            SessionFull: ``max_waiting`` wait already.
            SessionClosed: it takes no more.
        """
        scale = self._sampler.guidance_scale if guidance_scale is None else guidance_scale
        if (scale is None) != (uncond_kwargs is None):
            raise ValueError(
                "guidance takes a guidance_scale, of submit or of the Sampler, and uncond_kwargs, "
                "both or neither"
            )
        for name, kwargs in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise TypeError(f"{name} must be a mapping; got {type(kwargs).__name__}")
            if kwargs and not all(isinstance(key, str) for key in kwargs):
                raise TypeError(f"{name} must have names as keys; got {list(kwargs)}")
        flyer = Flyer(
            as_int("seed", seed, 1 << 64),
            as_int("sample_id", sample_id, 1 << 63),
            None if num_steps is None else _at_least("num_steps", num_steps, 1),
            dict(model_kwargs or {}),
            None if uncond_kwargs is None else dict(uncond_kwargs),
            None if scale is None else finite("guidance_scale", scale),
            given=self._settings.event(),
        )
        handle = Handle(self._book, flyer, *self._flight.lanes.ends(flyer.num_steps))
        self._enter([handle], bounded=True)
        return handle

    def _enter(self, handles: Sequence[Handle], bounded: bool) -> None:
        book = self._book
        with book.changed:
            book.enter(handles, bounded)
            try:
                self._worker.start()
            except RuntimeError:
                for handle in handles:
                    del book.waiting[handle._flyer]
                raise
            book.changed.notify_all()
        if not book.is_own_thread():
            release_threads()

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more samples, and returns when those that were asked for are finished; what is
        finished stays.

        Args:
            cancel: gives up those that are not; their ``result`` raises SessionClosed.
        """
        book = self._book
        try:
            with book.changed:
                book.closed = True
                book.changed.notify_all()
            if cancel:
                book.give_up()
            if book.is_own_thread():
                return  # a callback of a handle's: the thread cannot wait for itself
            release_threads()
            with book.changed:
                while book.waiting or book.running or book.stepping:
                    book.changed.wait()
        except BaseException:  # Ctrl-C
            book.give_up()
            raise

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves all samples between two steps: those that wait, those under way with their states,
        those that are finished and whose result nobody took, unless nobody has their handles any
        more. The session goes on. A sample that failed is saved to be drawn again.

        Args:
            folder: of the state, made where it does not exist; a session's state that it holds is
                replaced, whole or not at all.

        Raises:
            TypeError: ``model_kwargs`` with more than tensors, numbers, strings and None in
                dictionaries, lists and tuples.
            ValueError: the folder holds something else; the model's weights were changed while
                samples of its plan are under way, which go on with those of before.
            SessionClosed: it was closed and gave samples up: they cannot be saved any more.
            InUseError: another process, or another thread, saves there.
            OSError: it cannot be written.
            ImportError: safetensors is not installed.
        """
        flight, book = self._flight, self._book

        def all_of_it() -> tuple[dict[str, str], list[Flyer]]:
            finished, unfinished = book.all_of_it()
            flyers = [_finished_flyer(handle, end) for handle, end in finished.items()]
            for flyer, (kwargs, uncond_kwargs) in unfinished.items():
                row, x = flight.state_of(flyer)
                flyer = replace(flyer, kwargs=kwargs, uncond_kwargs=uncond_kwargs, x=x, row=row)
                flyers.append(flyer)
            return flight.description(), flyers

        with self._worker.paused():
            description, flyers = self._settings.run(all_of_it)
        saved.save(folder, description, flyers)

    def restore(self, folder: str | os.PathLike[str]) -> list[Handle]:
        """Takes up all samples that :meth:`save` saved, in their order, to the same bits as if
        nothing had happened where a sample's bits do not depend on its company; ``max_waiting``
        does not bound them.

        Returns:
            Their handles: those that were finished, under way, waiting. What failed is drawn again.

        Raises:
            FileNotFoundError: the folder holds no state.
            ValueError: a state of another sampler, of another shape or another arithmetic (device,
                plan, dtype, autocast), and in what they differ; a damaged one.
            SessionClosed: it takes no more.
            ImportError: safetensors is not installed.
        """
        with self._worker.paused():
            description = self._settings.run(self._flight.description)
        handles, unfinished = [], []
        for flyer in saved.load(folder, description, self._flight.lanes.ends):
            if flyer.x is not None and list(flyer.x.shape) != self._flight.shape:
                raise ValueError(
                    f"{os.fspath(folder)} holds a sample of shape {list(flyer.x.shape)}, which is "
                    f"{self._flight.shape} here"
                )
            flyer.given = self._settings.event()
            handle = Handle(self._book, flyer, *self._flight.lanes.ends(flyer.num_steps))
            handles.append(handle)
            if flyer.row < handle.num_steps:
                unfinished.append(handle)
        self._enter(unfinished, bounded=False)
        for handle in handles:
            x = handle._flyer.x
            if handle._flyer.row == handle.num_steps and x is not None:
                handle._flyer.x = None
                self._book.finish(handle, x.to(self._flight.device))
        return handles

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(cancel=kind is not None)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await asyncio.to_thread(self.close, cancel=kind is not None)
        except asyncio.CancelledError:
            self._book.give_up()
            raise

    def __iter__(self) -> Iterator[Handle]:
        self._warn_of_losses()
        while True:
            promise = self._book.next_finished()
            try:
                if not promise.done():
                    self._book.refuse_own_thread()
                    release_threads()
                handle = promise.result()
            except BaseException:  # Ctrl-C
                self._book.not_taken(promise)
                raise
            if handle is None:
                return
            yield handle

    async def __aiter__(self) -> AsyncIterator[Handle]:
        self._warn_of_losses()
        while True:
            promise = self._book.next_finished()
            try:
                handle = await asyncio.wrap_future(promise)
            except BaseException:
                self._book.not_taken(promise)
                raise
            if handle is None:
                return
            yield handle

    def _warn_of_losses(self) -> None:
        if count := self._book.lost():
            warn_caller(
                f"{count} finished samples are not among those that are iterated over: of samples "
                f"whose handles nobody has, a session keeps the last {self.max_batch} + "
                f"{self.max_waiting} (max_batch + max_waiting) until it is iterated over"
            )


def _finished_flyer(handle: Handle, end: End) -> Flyer:
    """With its result as its state; of one that failed, from the beginning."""
    if isinstance(end, Tensor):
        return replace(handle._flyer, x=end.cpu(), row=handle.num_steps)
    return replace(handle._flyer, x=None, row=0)


def _at_least(name: str, value: object, least: int) -> int:
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number
