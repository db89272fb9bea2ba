"""A live view: lines of JSON while a request's images are drawn.

Frames are spread over the steps, so that a fast model is seen as well as a slow one, and beside
those come a few a second where steps take long. Each is what there is when it is made: a reader who
is slow gets fewer, and none is kept for him.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..sampling import SampleStep
from .drawings import Drawing
from .encoding import sheet
from .errors import ClientGone
from .guard import unless_gone
from .requests import Asked
from .service import Service

_HEARTBEAT_SECONDS = 5.0  # after which a line says that all that is asked for waits
_TOGETHER_SECONDS = 0.01  # in which all of a batch have told of their step


class Live(Response):
    """The answer: lines of ``{"event": …}``.

    begin: the images; frame: some of them at their steps, as one picture; image: a finished one;
    failed: one that cannot be; waiting: nothing has happened for a while; end.
    """

    media_type = "application/x-ndjson"

    def __init__(self, service: Service, asked: Asked) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service, self._asked = service, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError before anything is sent."""
        service = self._service
        with (
            contextlib.suppress(ClientGone),
            service.request(),
            service.drawings(self._asked.addresses) as drawings,
        ):
            await unless_gone(receive, self._tell(send, drawings))

    async def _tell(self, send: Send, drawings: Sequence[Drawing]) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)

        async def line(event: str, **values: Any) -> None:
            text = json.dumps({"event": event, **values}) + "\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        offer = self._service.offer
        await line("begin", images=[offer.told(drawing.address) for drawing in drawings])
        pace = _Pace(drawings, self._asked.frames, offer.limits.frames_per_second)
        left, failed = dict(enumerate(drawings)), 0
        peeks: dict[int, asyncio.Future[SampleStep]] = {}
        while left:
            if self._asked.frames:
                await _any([drawing.finished for drawing in left.values()], pace.wait())
                for i, drawing in left.items():
                    if i not in peeks and not drawing.finished.done():
                        peeks[i] = asyncio.wrap_future(drawing.handle.peek())
                        peeks[i].add_done_callback(_is_step)  # its error is the image's
            ends = [drawing.finished for drawing in left.values()]
            if not await _any([*ends, *peeks.values()], _HEARTBEAT_SECONDS):
                await line("waiting", **_place(self._service))
                continue
            steps = await _taken(peeks, drawings)
            if steps and pace.due(steps):
                await line("frame", **await self._frame(steps))
            for i in [i for i, drawing in left.items() if drawing.finished.done()]:
                finished = left.pop(i).finished
                peeks.pop(i, None)
                if (error := finished.exception()) is None:
                    file = base64.b64encode(finished.result().file).decode()
                    await line("image", image=i, png=file)
                else:
                    failed += 1
                    await line("failed", image=i, message=self._service.failed(error).message)
        await line("end", drawn=len(drawings) - failed, failed=failed)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frame(self, steps: dict[int, SampleStep]) -> dict[str, Any]:
        """Images by their place in the request, the step that each has taken, and their states."""
        told: dict[str, Any] = {
            "images": list(steps),
            "steps": [step.step + 1 for step in steps.values()],
        }
        loop, watch = asyncio.get_running_loop(), self._asked.watch
        for name in ("x0", "x_t"):
            if watch in (name, "both"):
                states = [step.x0 if name == "x0" else step.x for step in steps.values()]
                file, told["columns"] = await loop.run_in_executor(
                    self._service.pool, sheet, states
                )
                told[name] = base64.b64encode(file).decode()
        return told


class _Pace:
    """When the next frame is due.

    Args:
        drawings: that it shows.
        frames: spread over the steps of each.
        per_second: that come in between where these are slower.
    """

    def __init__(self, drawings: Sequence[Drawing], frames: int, per_second: float) -> None:
        longest = max(drawing.handle.num_steps for drawing in drawings)
        self._gap = max(1, longest // frames) if frames else longest
        self._seconds = 1 / per_second
        self._shown: dict[int, int] = {}
        self._last, self._row = time.monotonic(), 0
        self._each = 0.0  # seconds a step

    def wait(self) -> float:
        """Seconds before it is worth to look."""
        return min(self._seconds, 0.7 * self._gap * self._each)

    def due(self, steps: dict[int, SampleStep]) -> bool:
        now = time.monotonic()
        row = max(step.step for step in steps.values())
        if row > self._row:
            self._each = (now - self._last) / (row - self._row)
        due = now - self._last >= self._seconds or any(
            step.step - self._shown.get(i, -self._gap) >= self._gap for i, step in steps.items()
        )
        if due:
            self._last, self._row = now, row
            self._shown.update((i, step.step) for i, step in steps.items())
        return due


async def _taken(
    peeks: dict[int, asyncio.Future[SampleStep]], drawings: Sequence[Drawing]
) -> dict[int, SampleStep]:
    """The steps of those that are done, which are peeks no more; the last ones left out."""
    running = [peek for i, peek in peeks.items() if drawings[i].handle.running()]
    if running:
        await asyncio.wait(running, timeout=_TOGETHER_SECONDS)
    seen = {i: peeks.pop(i) for i in list(peeks) if peeks[i].done()}
    steps = {i: peek.result() for i, peek in seen.items() if _is_step(peek)}
    return {i: step for i, step in steps.items() if step.step + 1 < drawings[i].handle.num_steps}


async def _any(futures: Sequence[asyncio.Future[Any]], timeout: float) -> bool:
    """Whether one is done in time."""
    done, _ = await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def _is_step(peek: asyncio.Future[SampleStep]) -> bool:
    """Of a peek that is done."""
    return not peek.cancelled() and peek.exception() is None


def _place(service: Service) -> dict[str, Any]:
    status = service.status()
    return {"waiting": status["waiting"], "running": status["running"]}
