"""In-flight batching: a Sampler that draws for many who ask at any time.

What continuous batching is to language models (Yu et al. 2022, Orca), for diffusion: the batch is
put together anew at every step. A thread of the session's own takes the steps; whoever asks gets a
handle, in any thread or event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops.checks import as_int
from ..schedule import integer
from .flight import Flight, Flyer, Landed
from .threads import Settings, release_threads

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..sampler import Sampler

_PAUSE_SECONDS = 0.05  # without work, after which OpenMP's threads, which spin, are not kept
_IDLE_SECONDS = 5.0  # after which a thread without work ends; the next request starts another


class SessionFull(RuntimeError):
    """More wait than the session lets wait."""


class SessionClosed(RuntimeError):
    """The session takes no more, or was closed before the sample was finished."""


class Handle(Future[Tensor]):
    """A sample that was asked for: a ``concurrent.futures.Future``, which can be awaited as well.

    Attributes:
        seed, sample_id: its noise's address.
        num_steps: of its trajectory.
    """

    def __init__(self, session: Session, flyer: Flyer, num_steps: int) -> None:
        super().__init__()
        self.seed, self.sample_id, self.num_steps = flyer.seed, flyer.sample_id, num_steps
        self._session: Session | None = session
        self._flyer = flyer
        self._delivered = self._given_up = False  # it has an end, or is about to; by cancel

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self._flyer.row

    def running(self) -> bool:
        """Whether it is in the batch."""
        session = self._session
        return session is not None and self in session._running

    def cancel(self) -> bool:
        """Gives the sample up, waiting or running; False if it is finished already."""
        session = self._session
        return session._cancel(self) if session is not None else self._given_up

    def result(self, timeout: float | None = None) -> Tensor:
        """The sample [C, …], float32 on the sampler's device; the same tensor at every call.

        Raises:
            FloatingPointError: its state turned NaN.
            SessionClosed: the session was closed before.
            concurrent.futures.CancelledError: it was cancelled.
            TimeoutError: it is not there within ``timeout`` seconds.
            Exception: whatever the model raised for it.
            RuntimeError: it is waited for in a callback of the session's, which goes on after it.
        """
        self._about_to_wait(timeout)
        try:
            sample = super().result(timeout)
        except BaseException as error:
            # A timeout or Ctrl-C has taken nothing, though it may have finished just now
            if self.done() and not self.cancelled() and super().exception() is error:
                self._collect()
            raise
        self._collect()
        return sample

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What :meth:`result` raises, or None."""
        self._about_to_wait(timeout)
        error = super().exception(timeout)
        self._collect()
        return error

    def _about_to_wait(self, timeout: float | None) -> None:
        if self.done():
            return
        if timeout is None and (session := self._session) is not None:
            session._refuse_own_thread()
        release_threads()

    def _collect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session._collected(self)

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self).__await__()

    def __repr__(self) -> str:
        what = "done" if self.done() else f"{self.step} of {self.num_steps} steps"
        return f"<Handle of seed {self.seed}, sample {self.sample_id}: {what}>"


class Session:
    """Draws samples that are asked for at any time; made by ``Sampler.session``.

    Those that are at different steps share calls of the model, up to ``max_batch`` of them; who
    comes first is served first. Each is what ``sampler.sample([1, *shape], …)`` draws, to the
    rounding of the model's arithmetic in a batch of another size. The model is called by a thread
    of the session's own; nothing else may change it meanwhile: changed weights are seen when no
    sample is under way.

    Samples whose ``model_kwargs`` differ in more than the values of tensors that are one sample's,
    [1, …], are computed in calls of their own. If a call of the model fails, each of its samples
    takes that step alone, and those that fail alone get the exception.

    As a context manager it waits at the end for what was asked for, or gives it up if the block
    ends by an exception. Iterating, plainly or in an event loop, gives finished handles in the
    order in which they finish, until nothing is left to wait for; without those whose result was
    taken before.

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
        self._changed = threading.Condition()
        # Both by the order of arrival
        self._waiting: dict[Handle, None] = {}
        self._running: dict[Handle, None] = {}
        self._finished: dict[Handle, None] = {}
        self._dropped: list[Handle] = []
        self._iterators: deque[Future[Handle | None]] = deque()
        self._ending = 0  # samples that are no longer running, and not handed out yet
        self._closed, self._stepping, self._pauses = False, False, 0
        self._thread: threading.Thread | None = None
        _SESSIONS.add(self)

    @property
    def waiting(self) -> int:
        """How many samples wait for a place in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many are in the batch."""
        return len(self._running)

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
            None if scale is None else _finite(scale),
            given=self._settings.event(),
        )
        handle = Handle(self, flyer, self._flight.lanes.length(flyer.num_steps))
        self._enter([handle], bounded=True)
        return handle

    def _enter(self, handles: Sequence[Handle], bounded: bool) -> None:
        with self._changed:
            if self._closed:
                raise SessionClosed("the session is closed: it takes no more samples")
            # The batch takes them from those that wait at its next step
            room = max(self.max_batch - len(self._running), 0) + self.max_waiting
            if bounded and len(self._waiting) + len(handles) > room:
                raise SessionFull(
                    f"{len(self._waiting)} samples wait for a place in the batch of "
                    f"{self.max_batch}, and max_waiting is {self.max_waiting}: take results, or "
                    "ask again later"
                )
            self._waiting.update(dict.fromkeys(handles))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work,
                    name="ddpm_fast session",
                    daemon=True,  # _close_all ends it when the interpreter does
                )
                try:
                    self._thread.start()
                except RuntimeError:  # the system has no more
                    self._thread = None
                    for handle in handles:
                        del self._waiting[handle]
                    raise
            self._changed.notify_all()
        if not self._is_own_thread():
            release_threads()

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more samples, and returns when those that were asked for are finished; what is
        finished stays.

        Args:
            cancel: gives up those that are not; their ``result`` raises SessionClosed.
        """
        try:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            if cancel:
                self._give_up()
            if self._is_own_thread():
                return  # a callback of a handle's: the thread cannot wait for itself
            with self._changed:
                while self._waiting or self._running or self._stepping:
                    self._changed.wait()
        except BaseException:  # Ctrl-C
            self._give_up()
            raise

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves all samples between two steps: those that wait, those under way with their states,
        those that are finished and whose result nobody took. The session goes on.

        Args:
            folder: of the state, made where it does not exist; a session's state that it holds is
                replaced, whole or not at all.

        Raises:
            TypeError: ``model_kwargs`` with more than tensors, numbers, strings and None in
                dictionaries, lists and tuples.
            ValueError: the folder holds something else.
            OSError: it cannot be written.
            ImportError: safetensors is not installed.
        """
        from . import saved

        with self._paused():
            if settled := self._flight.settle():
                self._deliver(self._handles_of(settled))
            with self._changed:
                finished = list(self._finished)
                others = [*self._running, *self._waiting]
            flyers = [_finished_flyer(handle) for handle in finished]
            for handle in others:
                x = self._flight.state_of(handle._flyer)
                row = handle._flyer.row if x is not None else 0
                flyers.append(replace(handle._flyer, x=x, row=row))
        saved.save(folder, self._flight, flyers)

    def restore(self, folder: str | os.PathLike[str]) -> list[Handle]:
        """Takes up all samples that :meth:`save` saved, in their order, to the same bits as if
        nothing had happened where a sample's bits do not depend on its company; ``max_waiting``
        does not bound them.

        Returns:
            Their handles: those that were finished, under way, waiting. What failed is drawn again.

        Raises:
            FileNotFoundError: the folder holds no state.
            ValueError: a state of another sampler or shape, and in what they differ; a damaged one.
            SessionClosed: it takes no more.
            ImportError: safetensors is not installed.
        """
        from . import saved

        handles, unfinished = [], []
        for flyer in saved.load(folder, self._flight):
            handle = Handle(self, flyer, self._flight.lanes.length(flyer.num_steps))
            handles.append(handle)
            if flyer.row < handle.num_steps:
                unfinished.append(handle)
        self._enter(unfinished, bounded=False)
        for handle in handles:
            x = handle._flyer.x
            if handle._flyer.row == handle.num_steps and x is not None:
                handle._delivered = True
                handle.set_result(x.to(self._flight.device))
                with self._changed:
                    promise = self._offered(handle)
                if promise is not None:
                    promise.set_result(handle)
        return handles

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """No step is taken meanwhile."""
        with self._changed:
            self._pauses += 1
            # In a handle's callback the thread is between two steps
            while self._stepping and not self._is_own_thread():
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

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
            self._give_up()
            raise

    # Finished samples --------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Handle]:
        while True:
            promise = self._next()
            try:
                if not promise.done():
                    self._refuse_own_thread()
                handle = promise.result()
            except BaseException:  # Ctrl-C
                self._not_taken(promise)
                raise
            if handle is None:
                return
            yield handle

    async def __aiter__(self) -> AsyncIterator[Handle]:
        while True:
            promise = self._next()
            try:
                handle = await asyncio.wrap_future(promise)
            except BaseException:
                self._not_taken(promise)
                raise
            if handle is None:
                return
            yield handle

    def _next(self) -> Future[Handle | None]:
        """Of the handle that finishes next; of None where nothing is left to wait for."""
        promise: Future[Handle | None] = Future()
        with self._changed:
            if self._finished:
                handle = next(iter(self._finished))
                del self._finished[handle]
                promise.set_result(handle)
            elif self._nothing_left():
                promise.set_result(None)
            else:
                self._iterators.append(promise)
        return promise

    def _nothing_left(self) -> bool:
        """Under the lock: whether no handle can come any more."""
        return not (self._waiting or self._running or self._ending or self._finished)

    def _not_taken(self, promise: Future[Handle | None]) -> None:
        """Who waited for it does no longer: what it was given is the next one's."""
        if promise.cancel() or (handle := promise.result()) is None:
            return
        with self._changed:
            other = self._offered(handle)
            if handle in self._finished:
                self._finished = {handle: None, **self._finished}
        if other is not None:
            other.set_result(handle)
        self._release_iterators()

    def _offered(self, handle: Handle) -> Future[Handle | None] | None:
        """Under the lock, a finished handle: the promise of an iterator that waits for one and is
        to be given it; without one it is kept for the next. None, too, if its result was taken."""
        if handle._session is None:
            return None
        while self._iterators:
            promise = self._iterators.popleft()
            if promise.set_running_or_notify_cancel():
                return promise
        self._finished[handle] = None
        return None

    def _collected(self, handle: Handle) -> None:
        """Its result was taken: iterators need not give it."""
        with self._changed:
            self._finished.pop(handle, None)

    # Ends of samples ---------------------------------------------------------------------------

    def _cancel(self, handle: Handle) -> bool:
        with self._changed:
            if handle._delivered:
                return handle._given_up
            handle._delivered = handle._given_up = True
            self._forget(handle)
        Future.cancel(handle)
        handle.set_running_or_notify_cancel()  # who waits for several of them is told
        self._release_iterators()
        return True

    def _give_up(self) -> None:
        """Ends all that is not finished."""
        with self._changed:
            handles = [h for h in (*self._running, *self._waiting) if not h._delivered]
            for handle in handles:
                handle._delivered = True
                self._forget(handle)
        closed = "the session was closed before the sample was finished"
        failure = _settle((handle, SessionClosed(closed)) for handle in handles)
        self._release_iterators()
        if failure is not None:
            raise failure

    def _forget(self, handle: Handle) -> None:
        """Under the lock: it is neither waiting nor running."""
        self._waiting.pop(handle, None)
        if handle in self._running:
            del self._running[handle]
            self._dropped.append(handle)
        handle._session = None
        self._changed.notify_all()

    def _release_iterators(self) -> None:
        with self._changed:
            if not self._nothing_left():
                return
            promises = list(self._iterators)
            self._iterators.clear()
        for promise in promises:
            if promise.set_running_or_notify_cancel():
                promise.set_result(None)

    # The thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._settings.applied():
                while self._wait_for_work():
                    self._deliver(self._step())
        except BaseException as error:
            with self._changed:
                self._closed, self._stepping = True, False
                handles = [h for h in (*self._running, *self._waiting) if not h._delivered]
                for handle in handles:
                    handle._delivered = True
                    self._forget(handle)
                self._changed.notify_all()
            _settle((handle, error) for handle in handles)
            self._release_iterators()
            raise

    def _is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _refuse_own_thread(self) -> None:
        """Raises RuntimeError in a callback, after which the samples go on."""
        if self._is_own_thread():
            raise RuntimeError(
                "a callback of a sample's cannot wait for another sample of the session, which "
                "goes on when the callback returns"
            )

    def _wait_for_work(self) -> bool:
        """Whether there is some; after a while without, the thread is to end. Then a step is begun:
        :meth:`_step` or whatever stands in its place ends it."""
        with self._changed:
            while True:
                if not self._pauses:
                    if self._waiting or self._running or self._dropped or self._flight.busy:
                        self._stepping = True
                        return True
                    if not self._closed and self._changed.wait(_PAUSE_SECONDS):
                        continue
                    release_threads()
                    woken = not self._closed and self._changed.wait(_IDLE_SECONDS)
                    if not woken and not self._waiting:
                        self._thread = None
                        return False
                else:
                    self._changed.wait()

    def _step(self) -> list[tuple[Handle, Landed]]:
        """One step of all, those that wait let in before."""
        flight = self._flight
        with self._changed:
            dropped, self._dropped = self._dropped, []
        if dropped:
            flight.drop(handle._flyer for handle in dropped)
        with self._changed:
            room = flight.room
            admitted = [handle for handle, _ in zip(self._waiting, range(room), strict=False)]
            for handle in admitted:
                del self._waiting[handle]
            self._running.update(dict.fromkeys(admitted))
        landed = flight.join(handle._flyer for handle in admitted) if admitted else []
        landed += flight.step(wait=not self._waiting)
        return self._handles_of(landed)

    def _handles_of(self, landed: Sequence[Landed]) -> list[tuple[Handle, Landed]]:
        """Without those that were given up."""
        if not landed:
            return []
        with self._changed:
            handles = {id(handle._flyer): handle for handle in self._running}
        found = [(handles.get(id(each.flyer)), each) for each in landed]
        return [(handle, each) for handle, each in found if handle is not None]

    def _deliver(self, landed: Sequence[tuple[Handle, Landed]]) -> None:
        """Ends a step. Callbacks of handles run here, without the lock."""
        ready = []
        with self._changed:
            for handle, each in landed:
                if not handle._delivered:  # nor given up while the step was taken
                    handle._delivered = True
                    del self._running[handle]
                    ready.append((handle, each))
            self._ending += len(ready)  # a callback that saves lets others land
        failure = _settle((handle, each.result) for handle, each in ready)
        with self._changed:
            given = [(self._offered(handle), handle) for handle, _ in ready]
            self._ending -= len(ready)
            self._stepping = False
            self._changed.notify_all()
        for promise, handle in given:
            if promise is not None:
                promise.set_result(handle)
        if ready:
            self._release_iterators()
        if failure is not None:
            raise failure


def _settle(ends: Iterable[tuple[Handle, Tensor | BaseException]]) -> BaseException | None:
    """Gives handles their results or exceptions, all of them: what a callback raises (SystemExit,
    say), or Ctrl-C, is returned."""
    failure = None
    for handle, end in ends:
        try:
            if isinstance(end, BaseException):
                handle.set_exception(end)
            else:
                handle.set_result(end)
        except BaseException as error:
            failure = error
    return failure


def _finished_flyer(handle: Handle) -> Flyer:
    """With its result as its state; of one that failed, from the beginning."""
    flyer = handle._flyer
    if Future.exception(handle) is not None:
        return replace(flyer, x=None, row=0)
    return replace(flyer, x=Future.result(handle).cpu(), row=handle.num_steps)


def _at_least(name: str, value: object, least: int) -> int:
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number


def _finite(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale must be a number; got {scale!r}")
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"guidance_scale must be finite; got {number}")
    return number


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """When the interpreter ends: no thread may be in torch then."""
    for session in list(_SESSIONS):
        thread = session._thread
        with session._changed:
            session._closed = True
            session._changed.notify_all()
        session._give_up()
        if thread is not None:
            thread.join()
