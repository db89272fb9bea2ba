"""A server in this process: until signals stop it, or for as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

import uvicorn

from .connection import TOLD, Connection, sweep
from .descriptors import fitting
from .guard import MOST_HEAD_BYTES

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from .service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KILLED = 128  # a shell's status for a process that a signal ended, plus the signal
_TELL_SECONDS = 2.0  # in which clients are told that their images were given up
_TICK = 0.05
_BACKLOG = 128  # asyncio accepts as many at once, before a connection is counted


class Server(uvicorn.Server):
    """uvicorn, that ends in two stages: first no request is taken any more, and those that were are
    answered; then connections are closed.

    Args:
        app: of ``create_app``.
        grace: seconds of the first stage, after which what is not finished is given up; None: as
            long as it takes.
        raising: whether the process may have more files open than it may now, if need be.

    Attributes:
        connections: how many it keeps: as many as the limits say and files may be open.
        gave_up: some was not finished.
    """

    def __init__(self, app: Starlette, grace: float | None = None, raising: bool = False) -> None:
        self.service: Service = app.state.service
        self.limits = self.service.offer.limits
        self.connections = fitting(self.limits.max_connections, TOLD + _BACKLOG, raising)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=self.connections,
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=MOST_HEAD_BYTES,
                timeout_keep_alive=math.ceil(self.limits.head_seconds),
            )
        )
        self.gave_up = False
        self._grace, self._stop = grace, asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """None of uvicorn's own: it would close connections at once."""
        return contextlib.nullcontext()

    def stop(self) -> None:
        """Begins to end, in the event loop's thread; again: at once."""
        if self._stop.is_set():
            self.gave_up = self.force_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeping = loop.create_task(sweep(self.server_state.connections, self.limits))
        ending = loop.create_task(self._drained())
        try:
            await super().main_loop()
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _drained(self) -> None:
        await self._stop.wait()
        self.service.draining = True
        end = None if self._grace is None else time.monotonic() + self._grace
        while self.service.requests and not self.force_exit:
            if end is not None and time.monotonic() >= end:
                self.gave_up = True
                break
            await asyncio.sleep(_TICK)
        if self.gave_up:
            await self.service.give_up()
        # For what clients have still to take; who takes nothing is cut
        seconds = _TELL_SECONDS
        if end is not None and not self.gave_up:
            seconds = max(seconds, end - time.monotonic())
        for_ever = end is None and not self.gave_up
        self.config.timeout_graceful_shutdown = None if for_ever else math.ceil(seconds)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        try:
            await super().shutdown(sockets)
        finally:
            if self._sweeping is not None:
                self._sweeping.cancel()
            for connection in list(self.server_state.connections):
                if connection.transport.get_write_buffer_size():
                    self.gave_up = True  # of an answer that was not taken
                connection.transport.abort()
            if self.force_exit:  # then uvicorn leaves the application's end out
                await self.lifespan.shutdown()
            await asyncio.sleep(0)  # in which transports close their sockets
            await asyncio.sleep(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket on which clients can connect from now on.

    Raises:
        OSError: no such address, or it is taken.
    """
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=passive)
    except UnicodeError:  # of its encoding as a name
        raise OSError("it is no name of a host") from None
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family)


def is_loopback(listener: socket.socket) -> bool:
    """Whether no other machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say(text: str, stream: TextIO) -> None:
    """In a line of its own. Who has read it so far may have gone: that ends no server."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or Python fails once more at its end


def run(app: Starlette, listener: socket.socket, grace: float | None, quiet: bool = False) -> int:
    """Serves until SIGINT or SIGTERM, then finishes what runs; in the main thread.

    Returns:
        The exit status: 0, all that was asked for is answered; 1, ``grace`` was over before; 128
        and its number, a second signal gave up.
    """
    server = Server(app, grace, raising=True)
    if server.connections < server.limits.max_connections:
        say(
            f"no more than {server.connections} connections: the system lets this process have no "
            "more files open (ulimit -n)",
            sys.stderr,
        )
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        if len(signals) > 2:  # a step that does not end
            os._exit(KILLED + number)
        server.stop()
        if len(signals) == 1 and not quiet and (count := server.service.requests):
            what = f"{count} request{'s' * (count != 1)}"
            say(f"finishing {what}; again gives up", sys.stderr)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        await server.serve(sockets=[listener])

    asyncio.run(main())
    if len(signals) > 1:
        return KILLED + signals[1]
    return int(server.gave_up)


@contextlib.contextmanager
def serving(
    app: Starlette, host: str = "127.0.0.1", port: int = 0, grace: float | None = None
) -> Iterator[str]:
    """Serves in a thread while the block lasts; what was asked for is finished at its end, and
    given up if it ends by an exception.

    Args:
        app: of :func:`create_app`.
        host, port: where; port 0 is one that is free.
        grace: seconds for what is not finished; None: as long as it takes.

    Yields:
        Its URL.

    Raises:
        OSError: no such address, or it is taken.
    """
    listener = listen(host, port)
    server, url = Server(app, grace), url_of(listener)
    loop = asyncio.new_event_loop()

    def work() -> None:
        try:
            loop.run_until_complete(server.serve(sockets=[listener]))
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=work, name="ddpm_fast server", daemon=True)
    thread.start()
    try:
        yield url
    except BaseException:
        _call(loop, server.stop)  # and once more
        raise
    finally:
        _call(loop, server.stop)
        thread.join()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(function)
