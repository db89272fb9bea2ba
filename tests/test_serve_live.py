"""A live view of images that are drawn: which lines come, and what is in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serve_cases import (
    LIMITS,
    SHAPE,
    app,
    decoded,
    events,
    gated,
    idle,
    message_of,
    model,
    paced,
    pixels_of,
    running,
)
from session_cases import wait_for

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.serving import Limits
from ddpm_fast.serving.encoding import SHEET_PIXELS, sheet
from ddpm_fast.training.pictures import to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")


def live(client, **values):
    with client.stream("POST", "/api/live", json=values) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        return list(events(response))


def tile(picture, columns, place):
    """[H, W, C] of a sheet's."""
    _, height, width = SHAPE
    top, left = place // columns * height, place % columns * width
    return picture[top : top + height, left : left + width]


def test_images_come_with_their_states_on_the_way():
    asked = {"seed": 7, "count": 3, "class": "dog", "steps": 50, "watch": "both", "frames": 50}
    with running(app(paced)) as client:
        told = live(client, **asked)
    assert told[0]["event"] == "begin"
    assert [(image["id"], image["class"]) for image in told[0]["images"]] == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    assert told[-1] == {"event": "end", "drawn": 3, "failed": 0}
    images = {event["image"]: event["png"] for event in told if event["event"] == "image"}
    assert len(images) == 3
    for i, file in images.items():
        assert np.array_equal(decoded(file), pixels_of(7, i, 1, 50))

    sampler = Sampler(model, NoiseSchedule.linear(50), num_steps=50)
    labels = torch.ones(3, dtype=torch.int64)
    steps = list(sampler.stream([3, *SHAPE], seed=7, model_kwargs={"class_labels": labels}))
    frames = [event for event in told if event["event"] == "frame"]
    assert frames
    for frame in frames:
        for name in ("x0", "x_t"):
            picture = decoded(frame[name])
            for place, (i, taken) in enumerate(zip(frame["images"], frame["steps"], strict=True)):
                assert 1 <= taken < 50
                step = steps[taken - 1]
                state = (step.x0 if name == "x0" else step.x)[i]
                expected = to_uint8(state).permute(1, 2, 0).numpy()
                assert np.array_equal(tile(picture, frame["columns"], place), expected)


@pytest.mark.parametrize("watch", ["x0", "x_t", "both"])
def test_what_is_watched_is_what_comes(watch, monkeypatch):
    monkeypatch.setattr("ddpm_fast.serving.live._HEARTBEAT_SECONDS", 0.2)
    asked = {"watch": watch, "frames": 10, "steps": 50}
    with gated() as (gate, _, client):
        with client.stream("POST", "/api/live", json=asked) as response:
            lines = events(response)
            assert next(lines)["event"] == "begin"
            # A frame is of a step that begins after the server has asked for it: at some step
            while (frame := next(lines))["event"] == "waiting":
                gate.let()
            gate.open()
            rest = [event["event"] for event in lines]
        assert frame["event"] == "frame"
        pictures = {"x0", "x_t"} if watch == "both" else {watch}
        assert set(frame) == {"event", "images", "steps", "columns", *pictures}
        assert rest[-2:] == ["image", "end"]


def test_without_frames_only_the_images_come():
    with running(app()) as client:
        told = live(client, count=6, frames=0)
    assert [event["event"] for event in told] == ["begin", *["image"] * 6, "end"]


def test_the_default_and_the_bounds_of_frames():
    with running(app(paced, limits=Limits(max_batch=4, max_frames=5))) as client:
        told = live(client, steps=50)
        assert sum(event["event"] == "frame" for event in told) >= 1
        for field, value in (("frames", 6), ("frames", -1), ("watch", "noise"), ("format", "png")):
            answer = client.post("/api/live", json={field: value})
            assert answer.status_code == 422
            assert answer.json()["error"]["field"] == field
            assert message_of(answer)


def test_samples_that_wait_come_later_and_at_their_own_steps():
    with running(app(paced, limits=Limits(max_batch=2, max_waiting=6))) as client:
        told = live(client, count=8, steps=20, frames=20)
    finished = [event["image"] for event in told if event["event"] == "image"]
    assert sorted(finished) == list(range(8))
    first_seen = {}
    for number, event in enumerate(told):
        for i in event.get("images", []) if event["event"] == "frame" else []:
            first_seen.setdefault(i, number)
    assert first_seen[0] < max(first_seen.values())


def test_a_line_says_that_all_waits(monkeypatch):
    monkeypatch.setattr("ddpm_fast.serving.live._HEARTBEAT_SECONDS", 0.05)
    with gated() as (gate, _, client), client.stream("POST", "/api/live", json={}) as response:
        lines = events(response)
        assert next(lines)["event"] == "begin"
        waiting = next(lines)
        gate.open()
        assert [event["event"] for event in lines][-1] == "end"
    assert waiting["event"] == "waiting"
    assert waiting["running"] + waiting["waiting"] == 1


def test_one_that_fails_is_told_and_the_others_come():
    def spoiled(x, t, class_labels):
        return torch.where((class_labels == 1)[:, None, None, None], torch.nan, model(x, t))

    with running(app(spoiled, guidance=False)) as client:
        told = live(client, count=4)
        ends = {event["image"]: event for event in told if event["event"] in ("image", "failed")}
        assert [ends[i]["event"] for i in range(4)] == ["image", "failed", "image", "image"]
        assert "NaN" in ends[1]["message"]
        assert told[-1] == {"event": "end", "drawn": 3, "failed": 1}


def test_two_watch_the_same_image_which_is_drawn_once():
    with gated() as (gate, service, client):
        with (
            client.stream("POST", "/api/live", json={"seed": 3}) as one,
            client.stream("POST", "/api/live", json={"seed": 3}) as other,
        ):
            wait_for(lambda: service.drawing == 2)
            gate.open()
            told = [list(events(response)) for response in (one, other)]
        files = [event["png"] for lines in told for event in lines if event["event"] == "image"]
        assert len(files) == 2
        assert files[0] == files[1]
        assert service.status()["drawn"] == 1
        wait_for(lambda: idle(service))


def test_the_same_image_twice_in_a_request():
    with running(app()) as client:
        told = live(client, sample_ids=[5, 5], frames=0)
        assert [event["event"] for event in told] == ["begin", "image", "image", "end"]
        assert client.get("/api/status").json()["drawn"] == 1


@pytest.mark.parametrize(("count", "side"), [(1, 8), (5, 8), (64, 8), (4, 600), (7, 300)])
def test_a_sheet_holds_all_and_is_bounded(count, side):
    torch.manual_seed(0)
    states = list(torch.rand(count, 1, side, side) * 2 - 1)
    file, columns = sheet(states)
    picture = decoded(file)
    rows = -(-count // columns)
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    stride = side // height
    assert height == width == -(-side // stride)
    assert count * height * width <= SHEET_PIXELS
    for i, state in enumerate(states):
        top, left = i // columns * height, i % columns * width
        found = picture[top : top + height, left : left + width]
        assert np.array_equal(found, to_uint8(state)[0, ::stride, ::stride].numpy())


def test_limits_are_those_of_any_request():
    with running(app(limits=LIMITS)) as client:
        assert client.post("/api/live", json={"count": 13}).status_code == 422
        assert client.get("/api/live").status_code == 405
        assert client.post("/api/live", content=b"{}").status_code == 415
