"""Answers that are no image: one shape of JSON for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class RequestError(Exception):
    """What is told to a client in place of what it asked for.

    Args:
        status: of HTTP.
        message: what came, and what is accepted.
        field: of the request, that it is about.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return failure(self.status, self.message, self.field, self.headers)


def shutting_down() -> RequestError:
    """Of requests that come too late, or are given up."""
    headers = {"connection": "close", "retry-after": "5"}
    return RequestError(503, "the server shuts down", headers=headers)


def failure(
    status: int,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """{"error": {"field": …, "message": …}}, the first where it is about one."""
    error = {"message": message} if field is None else {"field": field, "message": message}
    return answer({"error": error}, status, headers)


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, in ASCII: a surrogate that a request has brought cannot be written otherwise."""
    return Response(
        json.dumps(content).encode(),
        status,
        {"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )
