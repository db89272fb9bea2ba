"""What is looked at before a request is: to whom it is addressed, and how it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ClientGone, RequestError, shutting_down
from .service import Service

_T = TypeVar("_T")

MOST_HEAD_BYTES = 16384

# The page's own: nothing from elsewhere, and nobody else's page around it
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; "
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

        scope, started = _origin_form(scope), False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, guarded)
            return
        counted = contextlib.nullcontext() if _is_look(scope) else self._service.taken()
        try:
            with counted:
                await self._app(scope, receive, guarded)
        except asyncio.CancelledError:  # by a server whose time is over
            if started:
                raise
            await shutting_down().response()(scope, receive, guarded)

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
        return shutting_down() if self._service.draining and not _is_look(scope) else None


def _is_look(scope: Scope) -> bool:
    """At the server itself, which is answered at once and until its end."""
    return scope["path"].removeprefix(scope.get("root_path", "")) in _WHILE_DRAINING


def _origin_form(scope: Scope) -> Scope:
    """A request's target may be a whole URL, whose host then counts in place of the header's
    (RFC 9112, 3.2.2)."""
    raw = scope.get("raw_path") or b""
    scheme, found, rest = raw.partition(b"://")
    if not found or scheme.lower() not in (b"http", b"https"):
        return scope
    host, _, path = rest.partition(b"/")
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    return {
        **scope,
        "raw_path": b"/" + path,
        "path": unquote("/" + path.decode("ascii")),
        "headers": [(b"host", host), *headers],
    }


def host_name(host: str) -> str:
    """Of a Host header, without its port and in lower case.

    >>> host_name("LOCALHOST:8000"), host_name("[::1]:8000"), host_name("example.org")
    ('localhost', '::1', 'example.org')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def json_body(request: Request, service: Service) -> bytes:
    """A request's body, of at most ``body_bytes`` within ``body_seconds``.

    Raises:
        RequestError: 415 for another type than JSON's, 413 for more bytes, 408 for later ones, 503
            where the server gives up before.
        ClientGone: it never will be there.
    """
    most, seconds = service.offer.limits.body_bytes, service.offer.limits.body_seconds
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
        done = await _first(read(most), service.given_up.wait(), seconds)
        if done is None and service.given_up.is_set():
            raise shutting_down()
        if done is None:
            raise RequestError(
                408, f"the body was not there within {seconds:g} s", headers=_CLOSING
            )
        done.result()
        too_large = len(body) > most
    if too_large:
        # Who asks first whether to send it has sent nothing yet, and reading would say yes
        if request.headers.get("expect", "").lower() != "100-continue" or body:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(read(_DISCARDED), min(_DISCARD_SECONDS, seconds))
        raise RequestError(413, f"the body must have at most {most} bytes", headers=_CLOSING)
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work of a request gives, whose body was read.

    Raises:
        ClientGone: the client went away before; the work was cancelled.
    """
    done = await _first(work, _left(receive))
    if done is None:
        raise ClientGone
    return done.result()


async def _first(
    work: Coroutine[Any, Any, _T], other: Coroutine[Any, Any, Any], seconds: float | None = None
) -> asyncio.Future[_T] | None:
    """The work, done; None: the other was before it, or it took too long, and it was cancelled."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait((working, waiting), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return working if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
