"""What the server refuses, and how it says so; models that fail; servers that cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from serve_cases import app, message_of, model, post, running

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.serving import Limits, create_app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def client():
    with running(app()) as client:
        yield client


# What is refused ---------------------------------------------------------------------------

REFUSED = {
    "seed": [-1, 2**64, 1.5, "x", None, True, [], {}, "9" * 30, 10**100],
    "sample_ids": [[], [0] * 13, "0-3", [1, -1], [2**63], [None], {}, 3],
    "first_id": [-1, 2**63, "a"],
    "count": [0, 13, 1e3, "many", None],
    "class": ["horse", 4, -1, 1.0, True, {}, ["cat", "dog"], [], "\ud800", "x" * 500, [None]],
    "steps": [0, 51, -3, 2.5, "all", []],
    "guidance_scale": ["2", 100.5, -101, 1e300, [], True],
    "format": ["jpeg", None, 3, ["png"]],
    "colour": ["red", None],
    "\ud800": [1],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_out_of_range_is_named_with_what_is_accepted(client, field):
    for value in REFUSED[field]:
        body = json.dumps({field: value})
        answer = client.post(
            "/api/images", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 422, value
        assert answer.json()["error"]["field"] == field
        assert 10 < len(message_of(answer)) < 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"seed": 1,}', 400),
        (b'{"seed": NaN}', 400),
        (b'{"seed": -Infinity}', 400),
        (b"\xff\xfe", 400),
        (b"[" * 5000, 400),
        (b'{"a":' * 3000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b"[]", 422),
        (b"3", 422),
        (b'"seed"', 422),
        (b"null", 422),
        (b'{"seed": 1, "seed": 2}', 422),
        (b'{"guidance_scale": 1e999}', 422),
        (b'{"sample_ids": [0], "count": 1}', 422),
        (b'{"sample_ids": [0], "first_id": 1}', 422),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bodies_that_are_no_request(client, body, status):
    for path in ("/api/images", "/api/live"):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert message_of(answer)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("x/1.png", 404, None),
        ("1/x.png", 404, None),
        ("1/-1.png", 404, None),
        (f"{2**64}/1.png", 404, None),
        (f"1/{2**63}.png", 404, None),
        ("1/1.jpg", 404, None),
        ("1/1", 404, None),
        ("1/1.png?class=horse", 422, "class"),
        ("1/1.png?class=4", 422, "class"),
        ("1/1.png?steps=0", 422, "steps"),
        ("1/1.png?steps=51", 422, "steps"),
        ("1/1.png?steps=", 422, "steps"),
        ("1/1.png?guidance_scale=x", 422, "guidance_scale"),
        ("1/1.png?guidance_scale=nan", 422, "guidance_scale"),
        ("1/1.png?guidance_scale=1e999", 422, "guidance_scale"),
        ("1/1.png?size=3", 422, "size"),
        ("1/1.png?steps=3&steps=4", 422, "steps"),
    ],
)
def test_addresses_that_no_image_has(client, path, status, field):
    answer = client.get(f"/api/images/{path}")
    assert answer.status_code == status
    assert answer.json()["error"].get("field") == field
    assert message_of(answer)


def test_paths_and_methods(client):
    for path in ("/nothing", "/api", "/api/images/", "/api/images/1", "/page/index.html", "/../x"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert message_of(answer)
    for method, path, allowed in (
        ("GET", "/api/images", "POST"),
        ("DELETE", "/api/model", "GET"),
        ("POST", "/", "GET"),
        ("PUT", "/api/images/1/1.png", "GET"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert allowed in answer.headers["allow"]
        assert method in message_of(answer)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=x"]
)
def test_a_body_of_another_type(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post("/api/images", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert "application/json" in message_of(answer)


def test_a_model_without_classes_takes_none():
    with running(app(lambda x, t: 0.5 * x, classes=None, guidance=False)) as client:
        assert client.get("/api/model").json()["classes"] is None
        (image,) = post(client, steps=3).json()["images"]
        assert "class" not in image
        for field, value in (("class", 0), ("guidance_scale", 1.5)):
            answer = client.post("/api/images", json={field: value})
            assert answer.status_code == 422
            assert answer.json()["error"]["field"] == field
        assert client.get("/api/images/0/0.png?class=1").status_code == 422


# Other sites -------------------------------------------------------------------------------


def test_a_name_that_is_not_the_servers(client):
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "[::2]", "0.0.0.0"):
        answer = client.get("/api/model", headers={"host": host})
        assert answer.status_code == 421
        assert "localhost" in message_of(answer)
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/api/model", headers={"host": host}).status_code == 200
    with running(app(allowed_hosts=("Images.example",))) as other:
        assert other.get("/", headers={"host": "images.example"}).status_code == 200
        assert other.get("/").status_code == 421
    with running(app(allowed_hosts=None)) as other:
        assert other.get("/", headers={"host": "anything"}).status_code == 200


def test_pages_of_other_sites_have_nothing_drawn(client):
    url = "/api/images/1/1.png"
    cross = {"sec-fetch-site": "cross-site"}
    assert client.get(url, headers={**cross, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert client.get(url, headers={**cross, "sec-fetch-mode": "navigate"}).status_code == 200
    same = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    answer = client.get(url, headers={**same, "origin": "http://localhost"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert client.options("/api/images", headers={"origin": "http://x"}).status_code == 405


# The model's own failures ------------------------------------------------------------------


def test_a_model_that_fails_is_a_500_that_says_so_and_the_server_stays_up():
    def spoiled(x, t, class_labels=None):
        if class_labels is not None and (class_labels == 1).any():
            raise MemoryError("no room for a dog")
        return torch.where((class_labels == 3)[:, None, None, None], torch.nan, model(x, t))

    with running(app(spoiled, guidance=False)) as client:
        broken = client.post("/api/images", json={"class": "a bird"})
        assert broken.status_code == 500
        assert "NaN" in message_of(broken)
        raised = client.get("/api/images/0/0.png?class=dog")
        assert raised.status_code == 500
        assert "no room for a dog" in message_of(raised)
        assert post(client, **{"class": "cat"}).json()["images"][0]["class_name"] == "cat"
        assert client.get("/healthz").status_code == 200
        assert client.get("/api/status").json()["failed"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_ended_session_is_told_by_health():
    def leaves(x, t):
        raise SystemExit("gone")

    application = app(leaves, classes=None, guidance=False)
    with running(application) as client:
        first = client.post("/api/images", json={})
        assert first.status_code == 500
        second = client.post("/api/images", json={})
        assert second.status_code == 500
        assert "gone" in message_of(second)
        assert client.get("/healthz").status_code == 503


# Making one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shape": [3, 8]}, "shape must be"),
        ({"shape": [5, 8, 8]}, "shape must be"),
        ({"shape": [3, 0, 8]}, "shape must be"),
        ({"classes": []}, "classes must be"),
        ({"classes": "cats"}, "classes must be"),
        ({"guidance": True}, "guidance needs classes"),
    ],
)
def test_arguments_that_make_no_server(arguments, error):
    arguments = {"shape": [3, 8, 8], **arguments}
    sampler = Sampler(model, NoiseSchedule.linear(50))
    with pytest.raises((TypeError, ValueError), match=error):
        create_app(sampler, arguments.pop("shape"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_waiting": -1}, "max_waiting must be at least 0"),
        ({"max_batch": 2, "max_waiting": 3, "max_images": 6}, "max_images must be at most"),
        ({"head_seconds": 0}, "head_seconds must be positive"),
        ({"max_steps": 1.5}, "max_steps must be an integer"),
        ({"max_requests": True}, "max_requests must be an integer"),
    ],
)
def test_limits_that_cannot_be(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        Limits(**arguments)


def test_most_steps_bound_the_default():
    told = app(limits=Limits(max_steps=4)).state.service.offer.description()
    assert told["steps"] == {"least": 1, "most": 4, "default": 4}
