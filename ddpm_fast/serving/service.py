"""What a server's requests share: the session, its drawings, and whether it still takes more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..sessions import SessionClosed, SessionFull
from .drawings import Drawing, Drawings
from .encoding import Picture
from .errors import RequestError, shutting_down
from .offer import Address, Offer

_ENCODERS = 2


class Service:
    """Draws what requests ask for, in one session.

    Args:
        offer: what is drawn.

    Attributes:
        draining: no more requests are taken; those that were taken are finished.
        given_up: what is not finished will not be.
        requests: how many were taken and are not answered to their end.
        drawing: how many of these have images drawn.
    """

    def __init__(self, offer: Offer) -> None:
        limits = offer.limits
        self.offer = offer
        self._session = offer.unguided.session(
            offer.shape, max_batch=limits.max_batch, max_waiting=limits.max_waiting
        )
        self._pool = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="ddpm_fast encoder")
        self._drawings = Drawings(offer, self._session, self._pool)
        self._began = time.monotonic()
        self.draining, self.given_up = False, asyncio.Event()
        self.requests = self.drawing = 0
        self._broken = ""

    @property
    def pool(self) -> ThreadPoolExecutor:
        """For what takes long enough that the event loop must not wait for it."""
        return self._pool

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Of one that draws, until its answer is made.

        Raises:
            RequestError: 429 where too many do.
        """
        if self.drawing >= self.offer.limits.max_requests:
            raise self._busy(f"{self.drawing} requests are drawn already")
        self.drawing += 1
        try:
            yield
        finally:
            self.drawing -= 1

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """A request, from its head until its client has taken all of the answer: a server that
        ends waits for it."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextlib.contextmanager
    def drawings(self, addresses: Sequence[Address]) -> Iterator[list[Drawing]]:
        """Of images; what is not finished at the end is given up, unless others want it.

        Raises:
            RequestError: 429 where they have no room, 503 if the session has ended.
        """
        try:
            drawings = self._drawings.open(addresses)
        except SessionFull:
            raise self._busy(
                f"no room for {len(addresses)} images: {self._session.running} are drawn and "
                f"{self._session.waiting} wait, of {self.offer.limits.room}"
            ) from None
        except SessionClosed as error:
            raise self.failed(error) from error
        except ValueError as error:  # a number of steps that the method's spacing does not have
            raise RequestError(422, str(error), "steps") from None
        try:
            yield drawings
        finally:
            self._drawings.leave(drawings)

    async def pictures(self, drawings: Sequence[Drawing]) -> list[Picture]:
        """When all are finished.

        Raises:
            RequestError: 500 where the model failed, 503 where the server gave up.
        """
        try:
            return list(await asyncio.gather(*(drawing.picture() for drawing in drawings)))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> RequestError:
        """What a client is told of an image's end."""
        if isinstance(error, SessionClosed) and error.__cause__ is None:
            return shutting_down()
        if isinstance(error, SessionClosed):
            self._broken = f"an error ended the session: {error.__cause__!r}"
            return RequestError(500, f"{self._broken}; the server has to be started again")
        what = str(error).partition("\n")[0] or type(error).__name__
        return RequestError(500, f"the model failed: {what[:300]}")

    def health(self) -> tuple[bool, str]:
        """Whether it takes requests, in a word if not in more."""
        if self.draining:
            return False, "shutting down"
        return (False, self._broken) if self._broken else (True, "ok")

    def status(self) -> dict[str, Any]:
        drawings = self._drawings
        return {
            "waiting": self._session.waiting,
            "running": self._session.running,
            "requests": self.requests,
            "drawn": drawings.drawn,
            "failed": drawings.failed,
            "cancelled": drawings.cancelled,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "draining": self.draining,
        }

    async def give_up(self) -> None:
        """Ends what is not finished, and the session; requests are told so."""
        self.draining = True
        self.given_up.set()
        await asyncio.to_thread(self._session.close, cancel=True)

    async def close(self) -> None:
        """And its threads."""
        await self.give_up()
        await asyncio.to_thread(self._pool.shutdown)

    def _busy(self, message: str) -> RequestError:
        seconds = self._drawings.seconds_to_room()
        return RequestError(
            429, f"{message}; ask again later", headers={"retry-after": str(seconds)}
        )
