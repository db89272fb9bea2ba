"""Connections that are cut when their client is too slow: uvicorn waits for a request's head, and
for a reader, as long as they like."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

_SWEEP_SECONDS = 0.25
_LEAST_TAKEN = 1 << 14  # bytes of what is in a socket's buffer, in the seconds of a stall


class Connection(H11Protocol):
    """uvicorn's, that knows how long it has waited for its client.

    It is told so by :func:`sweep`: a second in which the event loop had no time to look at sockets
    is not the client's.

    Attributes:
        head: seconds that a request's head was waited for; None: it has come, and is answered.
        stall: seconds that there was no room in the socket's buffer, since its client has last
            taken some; None: there is.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()  # from limit_concurrency on they are told so
        self.head: float | None = 0.0
        self.stall: float | None = None
        self._begun = False  # a head that is not there yet
        self._left = 0  # bytes in that buffer when the stall began

    def data_received(self, data: bytes) -> None:
        if self.head is not None and not self._begun:
            self._begun, self.head = True, 0.0
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.head, self._begun = None, False

    def on_response_complete(self) -> None:
        self.head, self._begun = 0.0, bool(self.conn.trailing_data[0])
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP; a request whose body turns out to be none has no other answer."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self._refuse(400, "Bad Request", "the request is not HTTP/1.1")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        body = json.dumps({"error": {"message": message}})
        self.transport.write(
            f"HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        self.transport.close()

    def pause_writing(self) -> None:
        self.stall = 0.0
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stall = None
        super().resume_writing()

    def waited(self, seconds: float, limits: Limits) -> None:
        """For its client; it is cut where that is too long."""
        if self.transport.is_closing():
            self.stall = self.stall or 0.0  # for what is still in the buffer
        elif self.head is not None:
            self.head += seconds
            if self.head > limits.head_seconds and self._begun:
                late = f"the request was not there within {limits.head_seconds:g} s"
                self._refuse(408, "Request Timeout", late)
            elif self.head > limits.head_seconds:
                self.transport.close()
        if self.stall is None:
            return
        left = self.transport.get_write_buffer_size()
        self.stall += seconds
        if self.stall == seconds:
            self._left = left
        elif self.stall > limits.stall_seconds:
            if self._left - left < _LEAST_TAKEN:
                self.transport.abort()
            self.stall, self._left = 0.0, left


async def sweep(connections: set[Any], limits: Limits) -> None:
    """Tells all connections of a server how long they have waited, for ever."""
    pause = min(_SWEEP_SECONDS, limits.head_seconds / 4, limits.stall_seconds / 4)
    while True:
        await asyncio.sleep(pause)
        for connection in list(connections):
            connection.waited(pause, limits)
