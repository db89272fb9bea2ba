"""The server and clients that ask for too much, go away, or are slow."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from serve_cases import (
    LIMITS,
    Raw,
    app,
    decoded,
    gated,
    idle,
    in_thread,
    message_of,
    model,
    paced,
    pixels_of,
    running,
)
from session_cases import wait_for

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.serving import Limits, create_app

pytestmark = pytest.mark.usefixtures("one_thread")

IMPATIENT = replace(LIMITS, head_seconds=0.5, body_seconds=0.5, stall_seconds=0.5)


def asked_for(service):
    status = service.status()
    return status["running"] + status["waiting"]


def post(client, **values):
    return client.post("/api/images", json=values)


# Too much ----------------------------------------------------------------------------------


def test_where_there_is_no_room_it_says_when_to_ask_again():
    with gated(Limits(max_batch=2, max_waiting=4)) as (gate, service, client):
        first = in_thread(post, client, count=5)
        gate.reached()
        for path in ("/api/images", "/api/live"):
            full = client.post(path, json={"seed": 1, "count": 2})
            assert full.status_code == 429
            assert "no room for 2 images" in message_of(full)
            assert 1 <= int(full.headers["retry-after"]) <= 60
        # none of those two was kept, and one has room
        assert asked_for(service) == 5
        last = in_thread(post, client, seed=1)
        wait_for(lambda: asked_for(service) == 6)
        assert client.get("/api/images/1/0.png?steps=9").status_code == 429
        gate.open()
        assert [first().status_code, last().status_code] == [200, 200]
        assert post(client, seed=1, count=2).status_code == 200


def test_requests_at_once_are_bounded():
    with gated(replace(LIMITS, max_requests=2)) as (gate, service, client):
        asked = [in_thread(post, client, seed=seed) for seed in range(2)]
        wait_for(lambda: service.drawing == 2)
        busy = post(client, seed=3)
        assert busy.status_code == 429
        assert "2 requests" in message_of(busy)
        assert client.get("/api/status").status_code == 200
        gate.open()
        assert [wait().status_code for wait in asked] == [200, 200]


def test_a_body_too_large_is_not_read():
    most = LIMITS.body_bytes
    with running(app()) as client:
        headers = {"content-type": "application/json"}
        spaces = b" " * (most - 2)
        fits = client.post("/api/images", content=b"{" + spaces + b"}", headers=headers)
        assert fits.status_code == 200
        for content in (b"{" + spaces + b" }", iter([b"{", spaces, b" ", b"}"])):  # or in chunks
            answer = client.post("/api/images", content=content, headers=headers)
            assert answer.status_code == 413
            assert str(most) in message_of(answer)
        with Raw(client) as raw:  # of 10 GB: what comes is no more than a little
            raw.post("/api/images", None, b"x" * 1000, length=10**10)
            answer = raw.rest()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer


def test_a_head_too_large():
    with running(app()) as client:
        answer = client.get("/", headers={"x": "y" * 40000})
        assert answer.status_code == 431
        assert message_of(answer)
        with Raw(client) as raw:  # in pieces it is not read to its end
            raw.send("GET / HTTP/1.1\r\nhost: localhost\r\n")
            assert trickle(raw, ["x: " + "y" * 4000 + "\r\n"] * 100) < 100
        assert client.get("/healthz").status_code == 200


def test_connections_are_bounded():
    with running(app(limits=replace(LIMITS, max_connections=4))) as client:
        assert client.get("/healthz").status_code == 200
        raws = [Raw(client) for _ in range(40)]
        try:
            wait_for(lambda: client.get("/healthz").status_code == 503)
            full = client.get("/healthz")
            assert "4 connections are open" in message_of(full)
            assert full.headers["retry-after"] == "1"
            assert sum(cut(raw) for raw in raws[20:]) == 20  # at once
        finally:
            for raw in raws:
                raw.socket.close()
        wait_for(lambda: answers(client))


def answers(client):
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:  # those that are closed still count
        return False


def cut(raw):
    try:
        return raw.socket.recv(1) == b""
    except ConnectionResetError:
        return True


# Who goes away -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/images", "/api/live", "GET"])
def test_what_a_client_that_goes_away_wanted_is_given_up(path):
    with gated() as (gate, service, client):
        raw = Raw(client)
        if path == "GET":
            raw.send("GET /api/images/0/0.png HTTP/1.1\r\nhost: localhost\r\n\r\n")
        else:
            raw.post(path, {"count": 6})
        gate.reached()
        count = 1 if path == "GET" else 6
        assert asked_for(service) == count
        raw.socket.close()
        wait_for(lambda: idle(service))  # while the model's call still lasts
        wait_for(lambda: service.status()["cancelled"] == count)
        assert service.status()["drawn"] == 0
        gate.open()
        assert post(client, count=6).status_code == 200


def test_what_others_want_is_drawn_once_and_goes_on():
    with gated() as (gate, service, client):
        raw = Raw(client)
        raw.post("/api/images", {"seed": 5, "count": 2})
        gate.reached()
        other = in_thread(client.get, "/api/images/5/1.png?class=dog")
        wait_for(lambda: service.drawing == 2)
        assert asked_for(service) == 2
        raw.socket.close()
        wait_for(lambda: service.status()["cancelled"] == 1)
        gate.open()
        answer = other()
        assert np.array_equal(decoded(answer.content), pixels_of(5, 1, 1, 10))
        assert service.status()["drawn"] == 1


def test_a_client_that_goes_before_its_body_has_come():
    with running(application := app()) as client:
        with Raw(client) as raw:
            raw.post("/api/images", None, b"{", length=50)
        assert client.get("/healthz").status_code == 200
        wait_for(lambda: idle(application.state.service))


# Who is slow -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    ["", "G", "GET / HTTP/1.1\r\nhost: local", "POST /api/images HTTP/1.1\r\nhost: localhost\r\n"],
    ids=["nothing", "a letter", "half", "almost all"],
)
def test_a_head_that_does_not_come_is_not_waited_for(sent):
    with running(app(limits=IMPATIENT)) as client, Raw(client) as raw:
        raw.send(sent)
        answer = raw.rest()
        if sent:
            assert answer.startswith(b"HTTP/1.1 408")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        else:
            assert answer == b""


def trickle(raw, text, seconds=0.02):
    """A byte at a time, until the server has had enough; how many it took."""
    for sent, letter in enumerate(text):
        try:
            raw.send(letter)
        except OSError:
            return sent
        time.sleep(seconds)
    return len(text)


def test_a_head_a_byte_at_a_time_is_cut_also_after_a_first_request():
    text = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
    with running(app(limits=IMPATIENT)) as client, Raw(client) as raw:
        raw.send(f"{text}\r\n")
        assert raw.answer().startswith(b"HTTP/1.1 200")
        assert trickle(raw, text + "x: " + "y" * 1000) < 1000


def test_a_body_that_does_not_come_is_not_waited_for():
    with running(application := app(limits=IMPATIENT)) as client:
        with Raw(client) as raw:
            raw.post("/api/images", None, b"{", length=1000)
            answer = raw.rest()
        assert answer.startswith(b"HTTP/1.1 408")
        with Raw(client) as raw:
            raw.post("/api/live", None, b"", length=1000)
            assert trickle(raw, " " * 1000) < 1000
        wait_for(lambda: idle(application.state.service))


def test_slow_clients_keep_no_other_waiting():
    with running(app(limits=replace(LIMITS, head_seconds=30, body_seconds=30))) as client:
        raws = [Raw(client) for _ in range(20)]
        for i, raw in enumerate(raws):
            if i % 2:
                raw.send("GET / HT")
            else:
                raw.post("/api/images", None, b"{", length=100)
        for i in range(20):
            answer = client.get(f"/api/images/1/{i}.png?steps=3")
            assert np.array_equal(decoded(answer.content), pixels_of(1, i, i % 4, 3))
        for raw in raws:
            raw.socket.close()


def test_an_idle_connection_is_used_again_and_then_closed():
    with running(app(limits=IMPATIENT)) as client, Raw(client) as raw:
        for _ in range(3):
            raw.send("GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert raw.answer().startswith(b"HTTP/1.1 200")
        assert raw.rest() == b""


def test_a_reader_that_takes_nothing_is_cut_and_its_images_given_up():
    """Frames of a live view that would be megabytes, of a model that would go on for ever."""
    shape = [3, 128, 128]

    def endless(x, t):
        time.sleep(2e-3)
        return 0.5 * x

    sampler = Sampler(endless, NoiseSchedule.linear(4000))
    limits = replace(IMPATIENT, frames_per_second=200.0)
    application = create_app(sampler, shape, limits=limits)
    service = application.state.service
    with running(application) as client:
        with Raw(client, receive_buffer=4096) as raw:
            raw.post("/api/live", {"count": 4, "watch": "both", "frames": 120})
            wait_for(lambda: service.drawing == 1)
            wait_for(lambda: idle(service))  # not because they were finished
            assert service.status()["drawn"] == 0
            wait_for(lambda: service.status()["cancelled"] == 4)
        assert client.get("/healthz").status_code == 200


def test_a_slow_reader_gets_fewer_frames_and_all_images():
    """No buffer of a socket's in between: what is sent is what the server keeps for a reader."""
    asked = {"count": 4, "steps": 50, "watch": "x0", "frames": 50, "class": "cat"}

    async def read(seconds):
        told: list[dict[str, Any]] = []
        body = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

        async def receive():
            return body.pop() if body else await asyncio.Future()

        async def send(message):
            if message.get("body"):
                told.append(json.loads(message["body"]))
                await asyncio.sleep(seconds if told[-1]["event"] == "frame" else 0)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/api/live", "query_string": b""}
        await app(paced, guidance=False)({**scope, "headers": headers}, receive, send)
        return told

    counts = []
    for seconds in (0.0, 0.2):
        told = asyncio.run(read(seconds))
        steps = [event["steps"][0] for event in told if event["event"] == "frame"]
        assert steps == sorted(set(steps))  # each later than the one before
        images = {event["image"]: event["png"] for event in told if event["event"] == "image"}
        for i in range(4):
            assert np.array_equal(decoded(images[i]), pixels_of(0, i, 0, 50))
        counts.append(len(steps))
    assert 0 < counts[1] < counts[0]


def test_requests_one_after_another_on_a_connection_and_together():
    with running(app()) as client, Raw(client) as raw:
        request = "GET /api/images/1/{}.png?steps=2 HTTP/1.1\r\nhost: localhost\r\n"
        raw.send("\r\n".join(request.format(i) for i in range(3)) + "connection: close\r\n\r\n")
        assert raw.rest().count(b"HTTP/1.1 200 OK") == 3


def test_many_at_once_share_batches():
    with gated() as (gate, service, client):
        waits = [in_thread(post, client, seed=seed) for seed in range(8)]
        wait_for(lambda: asked_for(service) == 8)
        gate.open()
        for seed, wait in enumerate(waits):
            assert np.array_equal(
                decoded(wait().json()["images"][0]["png"]), pixels_of(seed, 0, 0, 10)
            )
        assert max(gate.sizes) == 4


def test_no_thread_is_left():
    before = set(threading.enumerate())
    with running(app(model)) as client:
        assert post(client).status_code == 200
    wait_for(lambda: set(threading.enumerate()) <= before)
    with pytest.raises(httpx.ConnectError):
        client.build_request("GET", "/") and httpx.get(f"{client.base_url}/healthz")
