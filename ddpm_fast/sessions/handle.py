"""What who asks a session for a sample gets."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import peeks
from .threads import release_threads

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..sampling import SampleStep
    from .book import Book
    from .flight import Flyer


class SessionFull(RuntimeError):
    """More wait than the session lets wait."""


class SessionClosed(RuntimeError):
    """The session takes no more, or was closed before the sample was finished. If an error ended
    it, that is the cause."""


class Handle(Future[Tensor]):
    """A sample that was asked for: a ``concurrent.futures.Future``, which can be awaited as well.

    Attributes:
        seed, sample_id: its noise's address.
        num_steps: of its trajectory.
        last_t: the timestep that its last step leaves.
    """

    def __init__(self, book: Book, flyer: Flyer, num_steps: int, last_t: int) -> None:
        super().__init__()
        self.seed, self.sample_id, self.num_steps = flyer.seed, flyer.sample_id, num_steps
        self._book: Book | None = book  # until its result is taken, or it is given up
        self._flyer = flyer
        self._delivered = self._given_up = False  # it has an end, or is about to; by cancel
        self._asked = False  # for its result: who asks keeps it
        self._restored = False  # it was finished when it was saved
        self.last_t, self._peeked = last_t, False

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self._flyer.row

    def running(self) -> bool:
        """Whether it is in the batch."""
        book = self._book
        return book is not None and self._flyer in book.running

    def cancel(self) -> bool:
        """Gives the sample up, waiting or running; False if it is finished, or about to be."""
        book = self._book
        return book.cancel(self) if book is not None else self._given_up

    def peek(self) -> Future[SampleStep]:
        """The next step that begins, when it has been taken: to watch the sample being drawn.

        Returns:
            A future of its ``SampleStep``: the step's row and timestep, the state after it and its
            clipped x̂₀, [C, …] float32 on the CPU, the caller's own. Of a finished sample, or one
            that finishes before it is looked at, the last step, with the image as both. It has the
            exception of a sample that fails, and is cancelled with one that is; cancelled itself,
            it is forgotten. A step that is looked at writes x̂₀ as well, and on a GPU is waited for;
            who does not look pays nothing. To be waited for outside the session's callbacks.

        >>> sampler = Sampler(lambda x, t: 0 * x, NoiseSchedule.linear(), num_steps=4)
        >>> with sampler.session([3, 8, 8], max_batch=8) as session:
        ...     handle = session.submit(seed=7)
        ...     step = handle.peek().result()
        >>> step.step in range(4), step.x0.shape
        (True, torch.Size([3, 8, 8]))
        """
        found: Future[SampleStep] = Future()
        self._flyer.peeks.append(found)
        if not self._peeked:
            self._peeked = True
            self.add_done_callback(peeks.end)
        if self.done():  # whose callbacks may have run before it was there
            peeks.end(self)
        return found

    def result(self, timeout: float | None = None) -> Tensor:
        """The sample [C, …], float32 on the sampler's device; the same tensor at every call.

        Raises:
            FloatingPointError: its state turned NaN.
            SessionClosed: the session was closed before.
            concurrent.futures.CancelledError: it was cancelled.
            TimeoutError: it is not there within ``timeout`` seconds. It is drawn all the same,
                unless it is cancelled.
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
        book = self._book
        if book is None:
            return
        book.asked(self)
        if self.done():
            return
        if not book.is_own_thread():
            release_threads()
        elif timeout is None:
            book.refuse_own_thread()

    def _collect(self) -> None:
        book, self._book = self._book, None
        if book is not None:
            book.collected(self)

    def __await__(self) -> Generator[Any, None, Tensor]:
        book = self._book
        if book is not None:
            book.asked(self)
        return asyncio.wrap_future(self).__await__()

    def __repr__(self) -> str:
        what = "done" if self.done() else f"{self.step} of {self.num_steps} steps"
        return f"<Handle of seed {self.seed}, sample {self.sample_id}: {what}>"
