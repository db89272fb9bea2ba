"""The server under load, with clients that vanish, are slow, or talk nonsense: whoever waits for an
answer gets his images, to the bit, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from serve_cases import CLASSES, LIMITS, SCHEDULE, SHAPE, app, decoded, idle, model, running
from session_cases import SECONDS, wait_for

from ddpm_fast import Sampler
from ddpm_fast.training.pictures import to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")

SOAKED = replace(
    LIMITS,
    max_batch=8,
    max_waiting=40,
    # On a machine that is busy otherwise this crowd may be slow for other reasons than it should
    head_seconds=60.0,
    body_seconds=60.0,
    stall_seconds=60.0,
    max_connections=200,
)
NONSENSE = (
    b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /api/images HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    b"POST /api/images HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 30000,
    b"\r\n\r\n\r\n",
)
MISTAKES = ({"seed": -1}, {"count": 10**6}, {"class": "horse"}, {"steps": "x"}, {"what": 1}, [])


SEEDS, STEPS = (0, 1, 2), (2, 5, 9)
IMAGES = list(itertools.product(range(8), range(4)))  # numbers and classes


def drawn(seed: int, steps: int, scale: float | None) -> np.ndarray[Any, Any]:
    """[N, H, W, C] of all images, in one batch, on which the model's bits do not depend."""
    labels = torch.tensor([label for _, label in IMAGES])
    x = Sampler(model, SCHEDULE, num_steps=steps, guidance_scale=scale).sample(
        [len(IMAGES), *SHAPE],
        seed=seed,
        sample_ids=[i for i, _ in IMAGES],
        model_kwargs={"class_labels": labels},
        uncond_kwargs=None if scale is None else {"class_labels": None},
    )
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


@dataclass
class Told:
    """What became of the clients."""

    answered: int = 0
    busy: int = 0
    vanished: int = 0
    refused: int = 0
    nonsense: int = 0
    wrong: list[str] = field(default_factory=list)


class Crowd:
    """Clients that do what clients do, for some seconds."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.told = url, Told()
        self._host, self._port = url.removeprefix("http://").split(":")
        self._random = random.Random(seed)
        self._expected = {
            (seed, i, label, steps, scale): pixels
            for seed, steps, scale in itertools.product(SEEDS, STEPS, (None, 1.5))
            for (i, label), pixels in zip(IMAGES, drawn(seed, steps, scale), strict=True)
        }

    def run(self, seconds: float, clients: int) -> Told:
        async def all_of_them() -> None:
            # httpcore closes connections that expire while it hands them on: none does
            limits = httpx.Limits(max_connections=None, keepalive_expiry=None)
            async with httpx.AsyncClient(
                base_url=self.url, timeout=SECONDS, limits=limits, trust_env=False
            ) as client:
                end = time.monotonic() + seconds
                await asyncio.gather(*(self._one(client, end) for _ in range(clients)))

        asyncio.run(all_of_them())
        return self.told

    async def _one(self, client: httpx.AsyncClient, end: float) -> None:
        kinds = (self._images, self._images, self._address, self._live, self._vanish, self._vanish)
        kinds = (*kinds, self._mistake, self._nonsense, self._slow)
        while time.monotonic() < end:
            await self._random.choice(kinds)(client)

    def _asked(self) -> dict[str, Any]:
        draw = self._random
        asked: dict[str, Any] = {
            "seed": draw.choice(SEEDS),
            "first_id": draw.randrange(5),
            "count": draw.choice([1, 1, 2, 4]),
            "steps": draw.choice(STEPS),
            "class": draw.randrange(4),
        }
        if draw.random() < 0.3:
            asked["guidance_scale"] = 1.5
        return asked

    def _check(self, asked: dict[str, Any], i: int, file: bytes | str) -> None:
        what = (
            asked["seed"],
            asked["first_id"] + i,
            asked["class"],
            asked["steps"],
            asked.get("guidance_scale"),
        )
        if not np.array_equal(decoded(file), self._expected[what]):
            self.told.wrong.append(f"another image for {what}")

    def _busy(self, response: httpx.Response) -> bool:
        if response.status_code != 429:
            return False
        self.told.busy += 1
        assert int(response.headers["retry-after"]) >= 1
        return True

    async def _images(self, client: httpx.AsyncClient) -> None:
        asked = self._asked()
        response = await client.post("/api/images", json=asked)
        if self._busy(response):
            return
        images = response.json()["images"]
        for i in range(asked["count"]):
            self._check(asked, i, images[i]["png"])
        self.told.answered += 1

    async def _address(self, client: httpx.AsyncClient) -> None:
        asked = {**self._asked(), "count": 1}
        query = {
            name: asked[name] for name in ("class", "steps", "guidance_scale") if name in asked
        }
        query["class"] = CLASSES[asked["class"]]  # "3" is another's name
        path = f"/api/images/{asked['seed']}/{asked['first_id']}.png"
        response = await client.get(path, params=query)
        if not self._busy(response):
            self._check(asked, 0, response.content)
            self.told.answered += 1

    async def _live(self, client: httpx.AsyncClient) -> None:
        asked = self._asked()
        seen = set()
        async with client.stream("POST", "/api/live", json={**asked, "watch": "both"}) as response:
            if self._busy(response):
                return
            async for line in response.aiter_lines():
                event = json.loads(line)
                if event["event"] == "image":
                    self._check(asked, event["image"], event["png"])
                    seen.add(event["image"])
        if seen != set(range(asked["count"])):
            self.told.wrong.append(f"images {seen} of {asked}")
        self.told.answered += 1

    async def _vanish(self, client: httpx.AsyncClient) -> None:
        """At any moment of any request."""
        path = self._random.choice(["/api/images", "/api/live"])
        body = json.dumps({**self._asked(), "count": 4, "steps": 50}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        data = head.encode() + body
        _, writer = await asyncio.open_connection(self._host, int(self._port))
        writer.write(data[: self._random.choice([10, len(head), len(data) - 1, *[len(data)] * 6])])
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.sleep(self._random.random() * 0.03)
            if self._random.random() < 0.5:
                writer.transport.abort()  # a reset, not an end
            writer.close()
            await writer.wait_closed()
        self.told.vanished += 1

    async def _mistake(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/api/images", json=self._random.choice(MISTAKES))
        if response.status_code != 422:
            self.told.wrong.append(f"{response.status_code} for a mistake")
        self.told.refused += 1

    async def _nonsense(self, client: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        answer = b""
        with contextlib.suppress(OSError):
            writer.write(self._random.choice(NONSENSE))
            with contextlib.suppress(asyncio.TimeoutError):  # of some it waits for the end
                answer = await asyncio.wait_for(reader.read(), 0.3)
            writer.close()
            await writer.wait_closed()
        if answer and not answer.startswith(b"HTTP/1.1 4"):
            self.told.wrong.append(f"{answer[:40]!r} for nonsense")
        self.told.nonsense += 1

    async def _slow(self, client: httpx.AsyncClient) -> None:
        _, writer = await asyncio.open_connection(self._host, int(self._port))
        with contextlib.suppress(OSError):
            for letter in b"GET /healthz HTTP/1.1\r\n"[: self._random.randrange(20)]:
                writer.write(bytes([letter]))
                await asyncio.sleep(0.005)
            writer.close()
            await writer.wait_closed()
        self.told.nonsense += 1


def soak(seconds: float, clients: int) -> None:
    application = app(limits=SOAKED)
    service = application.state.service
    process = psutil.Process()

    def held() -> tuple[int, int]:
        return process.num_fds(), process.num_threads()

    with running(application) as client:
        crowd = Crowd(str(client.base_url), 0)
        crowd.run(seconds / 4, clients)  # in which what is made once is made
        wait_for(lambda: idle(service))
        client.get("/healthz")
        gc.collect()
        before, memory = held(), process.memory_info().rss
        told = crowd.run(seconds, clients)
        wait_for(lambda: idle(service))
        wait_for(lambda: all(a <= b + 1 for a, b in zip(held(), before, strict=True)))
        gc.collect()
        grown = process.memory_info().rss - memory

        assert not told.wrong, told.wrong[:5]
        for count in (told.answered, told.vanished, told.refused, told.nonsense):
            assert count > clients // 2, told
        status = client.get("/api/status").json()
        assert status["failed"] == 0
        assert status["cancelled"] > 0
        assert len(service._drawings) == 0
        assert not service._session._book._held
        assert grown < 24 << 20, grown
        assert client.get("/healthz").status_code == 200


def test_a_crowd():
    soak(3.0, 16)


@pytest.mark.slow
def test_a_crowd_for_longer():
    soak(120.0, 60)
