"""Samples under way for requests: whoever asks for the same image meanwhile shares it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from ..sessions import Handle, Session, SessionClosed
from .encoding import Picture, picture
from .offer import Address, Offer


class Drawing:
    """An image that somebody waits for.

    Attributes:
        address: its own.
        handle: the session's.
        finished: of its files; fails as the handle does.
        wanted: by how many.
    """

    def __init__(self, offer: Offer, address: Address, handle: Handle, pool: Executor) -> None:
        self.address, self.handle, self.wanted = address, handle, 0
        self.finished = asyncio.ensure_future(_drawn(offer, address, handle, pool))

    async def picture(self) -> Picture:
        """When it is finished. Who stops waiting stops nothing: that is what Drawings.leave is for.

        Raises:
            FloatingPointError, SessionClosed, Exception: as Handle.result.
        """
        return await asyncio.shield(self.finished)


async def _drawn(offer: Offer, address: Address, handle: Handle, pool: Executor) -> Picture:
    end = asyncio.wrap_future(handle)
    await asyncio.wait([end])
    error = None if end.cancelled() else end.exception()
    if error is not None and not isinstance(error, Exception):
        # SystemExit, say, has ended the session's thread; raised here it would end the server's
        raise SessionClosed(f"an error ended the session: {error!r}") from error
    x = end.result()
    return await asyncio.get_running_loop().run_in_executor(pool, picture, offer, address, x)


class Drawings:
    """All of a server's, in one event loop.

    Args:
        offer, session: what draws.
        pool: encodes the images.

    Attributes:
        drawn, failed, cancelled: how many images have ended so.
    """

    def __init__(self, offer: Offer, session: Session, pool: Executor) -> None:
        self._offer, self._session, self._pool = offer, session, pool
        self._under_way: dict[Address, Drawing] = {}
        self._ends: deque[float] = deque(maxlen=256)
        self.drawn = self.failed = self.cancelled = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def open(self, addresses: Sequence[Address]) -> list[Drawing]:
        """Of all of these images or none; each is to be left once.

        Raises:
            SessionFull, SessionClosed, ValueError: as Session.submit.
        """
        drawings: list[Drawing] = []
        try:
            for address in addresses:
                drawing = self._under_way.get(address)
                if drawing is None:
                    handle = self._session.submit(**self._offer.arguments(address))
                    drawing = Drawing(self._offer, address, handle, self._pool)
                    drawing.finished.add_done_callback(self._counting(drawing))
                    self._under_way[address] = drawing
                drawing.wanted += 1
                drawings.append(drawing)
        except BaseException:
            self.leave(drawings)
            raise
        return drawings

    def leave(self, drawings: Sequence[Drawing]) -> None:
        """What nobody else waits for is given up at once, if it is not finished."""
        for drawing in drawings:
            drawing.wanted -= 1
            if not drawing.wanted:
                self._forget(drawing)
                drawing.handle.cancel()

    def seconds_to_room(self) -> int:
        """After how long it may be worth to ask again: one that waits now, drawn as fast as the
        last ones were; 1 … 60."""
        since = time.monotonic() - 30.0
        recent = [end for end in self._ends if end > since]
        if len(recent) < 2:
            return 1
        each = (recent[-1] - recent[0]) / (len(recent) - 1)
        return min(60, max(1, round(each * (self._session.waiting + self._session.running) / 2)))

    def _forget(self, drawing: Drawing) -> None:
        if self._under_way.get(drawing.address) is drawing:
            del self._under_way[drawing.address]

    def _counting(self, drawing: Drawing) -> Callable[[asyncio.Future[Picture]], None]:
        def count(finished: asyncio.Future[Picture]) -> None:
            if finished.cancelled():
                self.cancelled += 1
            elif finished.exception() is not None:  # asked for: nobody else may do so any more
                self.failed += 1
                self._forget(drawing)  # who asks for it next has it drawn anew
            else:
                self.drawn += 1
                self._ends.append(time.monotonic())

        return count
