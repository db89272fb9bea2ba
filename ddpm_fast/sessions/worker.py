"""The thread of a session's own, which takes its steps."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .threads import release_threads

if TYPE_CHECKING:
    from .book import Book
    from .flight import Flight, Landed
    from .threads import Settings

_PAUSE_SECONDS = 0.05  # without work, after which OpenMP's threads, which spin, are not kept
_IDLE_SECONDS = 5.0  # after which a thread without work ends; the next request starts another
_EXIT_SECONDS = 60.0  # that a step may last when the interpreter ends


class Worker:
    """Moves samples of a book through a flight, in a thread that there is while there is work.

    Args:
        flight, book: which are in step with each other whenever no step is under way.
        settings: under which the thread works.
    """

    def __init__(self, flight: Flight, book: Book, settings: Settings) -> None:
        self._flight, self._book, self._settings = flight, book, settings
        _WORKERS.add(self)

    def start(self) -> None:
        """Under the book's lock: sees to it that there is a thread.

        Raises:
            RuntimeError: the system has no more.
        """
        if self._book.thread is not None:
            return
        thread = self._book.thread = threading.Thread(
            target=self._work,
            name="ddpm_fast session",
            daemon=True,  # _close_all ends it when the interpreter does
        )
        try:
            thread.start()
        except RuntimeError:
            self._book.thread = None
            raise

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No step is taken meanwhile, and what has landed before is delivered; in a handle's
        callback, which runs between two steps, what lands with it is among the ending."""
        book = self._book
        if book.is_own_thread():
            yield
            return
        release_threads()
        me = object()
        try:
            with book.changed:
                book.pauses.add(me)
                while book.stepping:
                    book.changed.wait()
            yield
        finally:
            with book.changed:
                book.pauses.discard(me)
                book.changed.notify_all()

    def _work(self) -> None:
        book = self._book
        try:
            with self._settings.applied():
                while self._wait_for_work():
                    if landed := self._step():
                        book.deliver(landed)
        except BaseException as error:
            with book.changed:
                book.closed, book.stepping, book.cause = True, False, error
                book.changed.notify_all()
            with contextlib.suppress(BaseException):  # of callbacks: the first one counts
                book.give_up(error)
            raise

    def _wait_for_work(self) -> bool:
        """Ends a step, and begins the next when there is something to do; False after a while
        without, when the thread is to end."""
        book, flight = self._book, self._flight
        with book.changed:
            if book.stepping:
                if book.pauses and flight.landing:
                    return True  # to settle
                book.stepping = False
                if book.pauses or book.closed:
                    book.changed.notify_all()
            while True:
                if book.pauses:
                    if book.closed and not (book.waiting or book.running):
                        return self._end()
                    release_threads()
                    book.changed.wait()
                elif book.waiting or book.running or book.dropped or flight.busy:
                    book.stepping = True
                    return True
                elif book.closed or not book.changed.wait(_PAUSE_SECONDS):
                    release_threads()
                    woken = not book.closed and book.changed.wait(_IDLE_SECONDS)
                    if not woken and not book.waiting:
                        return self._end()

    def _end(self) -> bool:
        self._book.thread = None
        return False

    def _step(self) -> list[Landed]:
        """One step of all, those that wait let in before."""
        book, flight = self._book, self._flight
        if book.pauses:
            return flight.settle()
        if book.dropped:
            with book.changed:
                dropped, book.dropped = book.dropped, []
            flight.drop(dropped)
        landed = []
        if book.waiting and (room := flight.room):
            landed = flight.join(book.admit(room))
        landed += flight.step(wait=False)
        if not landed and flight.only_lands and not book.waiting:
            return flight.settle()
        return landed


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """When the interpreter ends: no thread may be in torch then."""
    for worker in list(_WORKERS):
        book = worker._book
        thread = book.thread
        with book.changed:
            book.closed = True
            book.changed.notify_all()
        book.give_up()
        if thread is not None:
            thread.join(_EXIT_SECONDS)
