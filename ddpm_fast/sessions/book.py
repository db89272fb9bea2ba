"""Where a session's samples stand: what its threads share, under one lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor

from .handle import Handle, SessionClosed, SessionFull

if TYPE_CHECKING:
    from .flight import Flyer, Landed

End = Tensor | BaseException
Arguments = tuple[dict[str, Any], dict[str, Any] | None]


class Book:
    """Who waits, runs, ends and is finished, and who iterates.

    Finished handles are kept for those who may iterate, until their result is taken: all once
    somebody has iterated, before that the last ones; not those whose result somebody has asked
    for, who keeps them if he wants it still.

    Args:
        max_batch, max_waiting: as of ``Sampler.session``.

    Attributes:
        changed: the lock of everything here; notified of what threads wait for.
        waiting, running: handles by their flyers, in the order of arrival.
        ending: ends that are being told: callbacks of handles run.
        dropped: given up while they ran.
        closed: no more are taken.
        gave_up: samples that were not finished when it was closed.
        stepping: a step is under way, or what landed at it is not delivered yet.
        pauses: of those who want no step to be taken.
        thread: that takes the steps, if there is one.
        cause: the error that ended it.
    """

    def __init__(self, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.changed = threading.Condition()
        self.waiting: dict[Flyer, Handle] = {}
        self.running: dict[Flyer, Handle] = {}
        self.ending: Mapping[Handle, End] = {}
        self.dropped: list[Flyer] = []
        self.closed, self.gave_up, self.stepping = False, False, False
        self.pauses: set[object] = set()
        self.thread: threading.Thread | None = None
        self.cause: BaseException | None = None
        # Both in the order in which they finished; without those whose result was taken
        self._finished: WeakKeyDictionary[Handle, None] = WeakKeyDictionary()
        self._given: WeakKeyDictionary[Handle, None] = WeakKeyDictionary()  # by iteration
        self._held: dict[Handle, None] = {}  # of the finished
        self._restored: dict[Handle, None] = {}  # likewise
        self._fallen: WeakSet[Handle] = WeakSet()  # out of these, and how many since
        self._fell = 0
        self._iterated = False
        self._iterators: deque[Future[Handle | None]] = deque()

    # Who asks ----------------------------------------------------------------------------------

    def enter(self, handles: Sequence[Handle], bounded: bool) -> None:
        """Under the lock: they wait.

        Raises:
            SessionClosed, SessionFull
        """
        if self.closed:
            why = "" if self.cause is None else f", since an error ended it: {self.cause!r}"
            raise SessionClosed(
                f"the session is closed: it takes no more samples{why}"
            ) from self.cause
        # The batch takes them from those that wait at its next step
        room = max(self.max_batch - len(self.running), 0) + self.max_waiting
        if bounded and len(self.waiting) + len(handles) > room:
            raise SessionFull(
                f"{len(self.waiting)} samples wait for a place in the batch of {self.max_batch}, "
                f"and max_waiting is {self.max_waiting}: take results, or ask again later"
            )
        self.waiting.update((handle._flyer, handle) for handle in handles)

    def admit(self, room: int) -> list[Flyer]:
        """Those that have waited longest run."""
        with self.changed:
            flyers = list(islice(self.waiting, room))
            self.running.update((flyer, self.waiting.pop(flyer)) for flyer in flyers)
        return flyers

    def is_own_thread(self) -> bool:
        return threading.current_thread() is self.thread

    def refuse_own_thread(self) -> None:
        """Raises RuntimeError in a callback, after which the samples go on."""
        if self.is_own_thread():
            raise RuntimeError(
                "a callback of a sample's cannot wait for another sample of the session, which "
                "goes on when the callback returns"
            )

    # Ends of samples ---------------------------------------------------------------------------

    def deliver(self, landed: Sequence[Landed]) -> None:
        """Tells ends. Callbacks of handles run here, without the lock.

        Raises:
            BaseException: what a callback raised that is none of its own matters: SystemExit, say.
        """
        ends: dict[Handle, End] = {}
        with self.changed:
            for each in landed:
                handle = self.running.pop(each.flyer, None)  # None: given up while it ran
                if handle is not None:
                    handle._delivered = True
                    ends[handle] = each.result
                    if isinstance(each.result, Tensor):  # else a saved session draws it again
                        each.flyer.release()
            self.ending = ends
        if not ends:
            return
        failure = _told(ends.items())
        with self.changed:
            given = [(self._offered(handle), handle) for handle in ends]
            self.ending = {}
        for promise, handle in given:
            if promise is not None:
                promise.set_result(handle)
        self.release_iterators()
        if failure is not None:
            raise failure

    def finish(self, handle: Handle, result: Tensor) -> None:
        """That has never run: it was finished when it was saved. No bound makes it fall out."""
        handle._delivered = handle._restored = True
        handle.set_result(result)
        with self.changed:
            promise = self._offered(handle)
        if promise is not None:
            promise.set_result(handle)

    def cancel(self, handle: Handle) -> bool:
        with self.changed:
            if handle._delivered:
                return handle._given_up
            handle._given_up = True
            self._forget(handle)
        Future.cancel(handle)
        handle.set_running_or_notify_cancel()  # who waits for several of them is told
        self.release_iterators()
        return True

    def give_up(self, error: BaseException | None = None) -> None:
        """Ends all that is not finished, by SessionClosed or another error.

        Raises:
            BaseException: as :meth:`deliver`.
        """
        with self.changed:
            handles = [*self.running.values(), *self.waiting.values()]
            self.gave_up |= bool(handles)
            for handle in handles:
                self._forget(handle)
        closed = "the session was closed before the sample was finished"
        failure = _told((handle, error or SessionClosed(closed)) for handle in handles)
        self.release_iterators()
        if failure is not None:
            raise failure

    def _forget(self, handle: Handle) -> None:
        """Under the lock: it is neither waiting nor running."""
        flyer = handle._flyer
        if self.waiting.pop(flyer, None) is not None:
            flyer.release()
        elif self.running.pop(flyer, None) is not None:
            self.dropped.append(flyer)
        handle._delivered, handle._book = True, None
        self.changed.notify_all()

    # Finished samples --------------------------------------------------------------------------

    def asked(self, handle: Handle) -> None:
        """For its result."""
        with self.changed:
            handle._asked = True
            self._let_go(handle)

    def collected(self, handle: Handle) -> None:
        """Its result was taken: iterators need not give it."""
        with self.changed:
            self._finished.pop(handle, None)
            self._given.pop(handle, None)
            self._let_go(handle)
            if handle in self._fallen:
                self._fallen.discard(handle)
                self._fell -= 1

    def all_of_it(self) -> tuple[dict[Handle, End], dict[Flyer, Arguments]]:
        """Of one moment: ends that somebody may still take; who runs and waits, with their
        arguments, which a flyer that is given up loses.

        Raises:
            SessionClosed: samples were given up, as the session was closed.
        """
        with self.changed:
            if self.gave_up:
                raise SessionClosed(
                    "the session was closed and has given up samples, which cannot be saved any "
                    "more: save before"
                )
            finished = [*self._given, *self._finished]
            ends = {
                handle: Future.exception(handle) or Future.result(handle) for handle in finished
            }
            ends.update(self.ending)
            ends = {handle: end for handle, end in ends.items() if handle._book is not None}
            unfinished = [*self.running, *self.waiting]
            return ends, {flyer: (flyer.kwargs, flyer.uncond_kwargs) for flyer in unfinished}

    def next_finished(self) -> Future[Handle | None]:
        """Of the handle that finishes next; of None where nothing is left to wait for."""
        promise: Future[Handle | None] = Future()
        with self.changed:
            self._iterated = True
            handle = next(iter(self._finished), None)
            if handle is not None:
                self._give(handle)
                promise.set_result(handle)
            elif self._nothing_left():
                promise.set_result(None)
            else:
                self._iterators.append(promise)
        return promise

    def not_taken(self, promise: Future[Handle | None]) -> None:
        """Who waited for it does no longer: what it was given is the next one's."""
        if promise.cancel() or (handle := promise.result()) is None:
            return
        with self.changed:
            self._given.pop(handle, None)
            others = list(self._finished)
            other = self._offered(handle)
            if other is None and handle._book is not None:
                self._finished.clear()
                self._finished.update(dict.fromkeys([handle, *others]))
        if other is not None:
            other.set_result(handle)
        self.release_iterators()

    def lost(self) -> int:
        """How many finished samples were not kept, and are nobody's."""
        with self.changed:
            count, self._fell = self._fell - len(self._fallen), len(self._fallen)
            return count

    def release_iterators(self) -> None:
        with self.changed:
            if not self._nothing_left():
                return
            promises = list(self._iterators)
            self._iterators.clear()
        for promise in promises:
            if promise.set_running_or_notify_cancel():
                promise.set_result(None)

    def _nothing_left(self) -> bool:
        """Under the lock: whether no handle can come any more."""
        return not (self.waiting or self.running or self.ending or len(self._finished))

    def _offered(self, handle: Handle) -> Future[Handle | None] | None:
        """Under the lock, a finished handle: the promise of an iterator that waits for one and is
        to be given it; without one it is kept for the next. None, too, if its result was taken."""
        if handle._book is None:
            return None
        while self._iterators:
            promise = self._iterators.popleft()
            if promise.set_running_or_notify_cancel():
                self._give(handle)
                return promise
        self._finished[handle] = None
        if not handle._asked:
            if handle._restored:
                self._restored[handle] = None
                return None
            self._held[handle] = None
            if not self._iterated and len(self._held) > self.max_batch + self.max_waiting:
                oldest = next(iter(self._held))
                del self._held[oldest]
                self._fallen.add(oldest)
                self._fell += 1
        return None

    def _give(self, handle: Handle) -> None:
        """Under the lock: to an iterator, whose it is."""
        self._finished.pop(handle, None)
        self._let_go(handle)
        self._given[handle] = None

    def _let_go(self, handle: Handle) -> None:
        self._held.pop(handle, None)
        self._restored.pop(handle, None)


def _told(ends: Iterable[tuple[Handle, End]]) -> BaseException | None:
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
