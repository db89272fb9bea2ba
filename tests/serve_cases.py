"""What the tests of the server share: small models, servers of them, and clients that misbehave."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
from PIL import Image
from session_cases import SECONDS, Gated, over

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.serving import Limits, create_app, serving
from ddpm_fast.training.pictures import to_uint8

SHAPE = (3, 4, 5)
CLASSES = ("cat", "dog", "3", "a bird")
SCHEDULE = NoiseSchedule.linear(50)
LIMITS = Limits(max_batch=4, max_waiting=8)


def model(x, t, class_labels=None):
    """Whose bits depend neither on the batch nor on a place in it, but on the class."""
    out = x * over(0.5 + t.to(x.dtype) / 128, x)
    return out if class_labels is None else out + over(class_labels.to(x.dtype) / 8, x)


def paced(x, t, class_labels=None):
    """The same, slow enough to be seen on the way."""
    time.sleep(2e-3)
    return model(x, t, class_labels)


def pixels_of(
    seed: int, sample_id: int, label: int | None, steps: int, scale: float | None = None
) -> np.ndarray[Any, Any]:
    """[H, W, C] of an image of :func:`model`, drawn alone."""
    kwargs = {} if label is None else {"class_labels": torch.tensor([label])}
    x = Sampler(model, SCHEDULE, num_steps=steps, guidance_scale=scale).sample(
        [1, *SHAPE],
        seed=seed,
        sample_ids=[sample_id],
        model_kwargs=kwargs,
        uncond_kwargs=None if scale is None else {"class_labels": None},
    )
    return to_uint8(x)[0].permute(1, 2, 0).numpy()


def app(called: Any = model, limits: Limits = LIMITS, **arguments: Any) -> Any:
    """An application of a model with classes, 10 steps if a request names none."""
    arguments = {"classes": CLASSES, "guidance": True, **arguments}
    sampler = Sampler(called, SCHEDULE, num_steps=10)
    return create_app(sampler, SHAPE, limits=limits, **arguments)


@contextlib.contextmanager
def running(application: Any) -> Iterator[httpx.Client]:
    """A client of a server of it."""
    with (
        serving(application) as url,
        httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client,
    ):
        yield client


@contextlib.contextmanager
def gated(limits: Limits = LIMITS) -> Iterator[tuple[Gated, Any, httpx.Client]]:
    """A model that waits to be let through, its service, and a client; the model is let through at
    the end."""
    gate = Gated(model)
    application = app(gate, limits)
    with running(application) as client:
        try:
            yield gate, application.state.service, client
        finally:
            gate.open()


def post(client: httpx.Client, **values: Any) -> httpx.Response:
    """Images that are there."""
    response = client.post("/api/images", json=values)
    assert response.status_code == 200, response.text
    return response


def in_thread(function: Any, *arguments: Any, **named: Any) -> Any:
    """Calls it in a thread; gives a function that waits for what it returns or raises."""
    ends: list[Any] = []

    def work() -> None:
        try:
            ends.append((function(*arguments, **named), None))
        except Exception as error:
            ends.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(SECONDS)
        result, error = ends[0]
        if error is not None:
            raise error
        return result

    return wait


def idle(service: Any) -> bool:
    """Whether nobody is served, and nothing is drawn."""
    status = service.status()
    return not (status["waiting"] or status["running"] or status["requests"])


def decoded(file: bytes | str) -> np.ndarray[Any, Any]:
    """[H, W, C] or [H, W] of a PNG file, or of one in base64."""
    return np.array(
        Image.open(io.BytesIO(base64.b64decode(file) if isinstance(file, str) else file))
    )


def message_of(response: httpx.Response) -> str:
    """Of an error, in the one shape that they have."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) <= {"field", "message"}
    return str(error["message"])


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Of a live view."""
    for line in response.iter_lines():
        yield json.loads(line)


class Raw:
    """A connection by hand; a context manager."""

    def __init__(self, client: httpx.Client, receive_buffer: int | None = None) -> None:
        parts = urlsplit(str(client.base_url))
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(SECONDS)
        self.socket.connect((parts.hostname, parts.port))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, text: str | bytes) -> None:
        self.socket.sendall(text.encode() if isinstance(text, str) else text)

    def post(self, path: str, values: Any, body: bytes | None = None, length: int = -1) -> None:
        """A request, of which no answer is waited for."""
        content = json.dumps(values).encode() if body is None else body
        self.send(
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content) if length < 0 else length}\r\n\r\n"
        )
        self.send(content)

    def answer(self) -> bytes:
        """The next one, whose length it tells."""
        found = b""
        while b"\r\n\r\n" not in found:
            found += self.socket.recv(1)
        length = re.search(rb"content-length: (\d+)", found)
        assert length is not None
        while len(found.partition(b"\r\n\r\n")[2]) < int(length[1]):
            found += self.socket.recv(1)
        return found

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        found = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                found += data
        return bytes(found)


def chromium() -> str | None:
    """A browser of this machine's."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    return None
