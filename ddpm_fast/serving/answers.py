"""Answers that may be large: a client that reads slowly is waited for."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_CHUNK = 1 << 16


class Answer(Response):
    """Sent in parts, each when the one before has left: the server knows when it has been sent.

    Args:
        content: of the body.
        headers: beside its type and length.
        media_type: of the body.
    """

    def __init__(self, content: bytes, headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(content, headers=headers, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        for i in range(0, len(self.body), _CHUNK):
            part = bytes(self.body[i : i + _CHUNK])
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
