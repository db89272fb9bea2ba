"""What is looked at before a request is: to whom it is addressed, and how it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ClientGone, RequestError
from .service import Service

_T = TypeVar("_T")

MOST_HEAD_BYTES = 16384

# The page's own: nothing from elsewhere, and nobody else's page around it
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_CLOSING = {"connection": "close"}
_WHILE_DRAINING = ("/healthz", "/api/status")
_DISCARDED, _DISCARD_SECONDS = 1 << 20, 1.0  # of a body too large, so that its sender hears why


class Guard:
    """An ASGI middleware.

    Args:
        app: behind it.
        service: of the server.
        hosts: names by which it may be asked; None: any. A page of another site whose name was
            made to lead here ("DNS rebinding") sends its own.
    """

    def __init__(self, app: ASGIApp, service: Service, hosts: Collection[str] | None) -> None:
        self._app, self._service = app, service
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        size = len(scope["path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEAD_BYTES:
            return RequestError(
                431, f"a request's head must have at most {MOST_HEAD_BYTES} bytes", headers=_CLOSING
            )
        if self._hosts is not None and host_name(headers.get("host", "")) not in self._hosts:
            return RequestError(
                421,
                f"it answers to {', '.join(sorted(self._hosts))} (--allow-host adds a name); asked "
                f"for {headers.get('host', '')[:80] or 'none'}",
                "host",
            )
        # Another site's page may lead here by a link, and have nothing drawn
        if (
            headers.get("sec-fetch-site") == "cross-site"
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            return RequestError(403, "asked for by a page of another site")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._service.draining and path not in _WHILE_DRAINING:
            return RequestError(
                503, "the server shuts down", headers={"connection": "close", "retry-after": "5"}
            )
        return None


def host_name(host: str) -> str:
    """Of a Host header, without its port and in lower case.

    >>> host_name("LOCALHOST:8000"), host_name("[::1]:8000"), host_name("example.org")
    ('localhost', '::1', 'example.org')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def json_body(request: Request, most: int, seconds: float) -> bytes:
    """A request's body.

    Args:
        most: bytes.
        seconds: in which it has to be there.

    Raises:
        RequestError: 415 for another type than JSON's, 413 for more bytes, 408 for later ones.
        ClientGone: it never will be.
    """
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        given = request.headers.get("content-type", "none")
        raise RequestError(
            415, f"Content-Type must be application/json in UTF-8; got {given:.80}", "content-type"
        )
    body = bytearray()
    declared = request.headers.get("content-length", "0")

    async def read(bound: int) -> None:
        more = len(body) <= bound
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body.extend(message.get("body", b""))
            more = message.get("more_body", False) and len(body) <= bound

    too_large = declared.isdecimal() and int(declared) > most
    if not too_large:
        try:
            await asyncio.wait_for(read(most), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestError(
                408, f"the body was not there within {seconds:g} s", headers=_CLOSING
            ) from None
        too_large = len(body) > most
    if too_large:
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(read(_DISCARDED), min(_DISCARD_SECONDS, seconds))
        raise RequestError(413, f"the body must have at most {most} bytes", headers=_CLOSING)
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work of a request gives, whose body was read.

    Raises:
        ClientGone: the client went away before; the work was cancelled.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
