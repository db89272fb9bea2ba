"""Connections that are cut when their client is too slow: uvicorn waits for a request's head, and
for a reader, as long as they like. And what they are told before there is a request."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import failure
from .guard import MOST_HEAD_BYTES
from .limits import Limits

TOLD = 16  # connections beyond the most that are kept to be told so
_AHEAD = 1 << 16  # bytes that are kept of what a client sends before it has its answer
_DISCARDED, _DISCARD_SECONDS = 1 << 20, 1.0  # of a client that is told to go away
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
        self._most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's is no JSON
        if self._most is not None and len(self.connections) > self._most + TOLD:
            transport.abort()
        self.head: float | None = 0.0
        self.stall: float | None = None
        self._begun = False  # a head that is not there yet
        self._left = 0  # bytes in that buffer when the stall began
        self._discarded: int | None = None  # bytes since it was told to go away
        self._parting = 0.0  # seconds since

    def data_received(self, data: bytes) -> None:
        if self._discarded is not None:
            self._discarded += len(data)
            if self._discarded > _DISCARDED:
                self.transport.abort()
            return
        if self.head is not None and not self._begun:
            self._begun, self.head = True, 0.0
        super().data_received(data)

    def handle_events(self) -> None:
        if self._most is not None:
            crowded = len(self.connections) >= self._most
            self.app = self._crowded if crowded else self.config.loaded_app
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.head, self._begun = None, False
            if self.conn.their_state is h11.DONE and self.flow.read_paused:
                # Its next request is paused, and a client that goes away has to be seen
                if len(self.conn.trailing_data[0]) > _AHEAD:
                    self.transport.abort()
                else:
                    self.flow.resume_reading()

    async def _crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"connection": "close", "retry-after": "1"}
        answer = failure(503, f"{self._most} connections are open already", headers=headers)
        await answer(scope, receive, send)

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
        error = sys.exc_info()[1]  # uvicorn tells h11's no further
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            what = f"a request's head must have at most {MOST_HEAD_BYTES} bytes"
            self._refuse(431, "Request Header Fields Too Large", what)
        elif "Host" in str(error):
            self._refuse(400, "Bad Request", "a request of HTTP/1.1 has one Host header")
        else:
            self._refuse(400, "Bad Request", "the request is not HTTP/1.1")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        """What the client still sends is read for a moment: closed before, it could lose the
        answer."""
        body = json.dumps({"error": {"message": message}})
        self.transport.write(
            f"HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        self._unset_keepalive_if_required()
        self._discarded = 0
        self.flow.resume_reading()
        self.transport.write_eof()

    def shutdown(self) -> None:
        if self._discarded is None:
            super().shutdown()
        else:
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
        elif self._discarded is not None:
            self._parting += seconds
            if self._parting > _DISCARD_SECONDS:
                self.transport.close()
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
