"""The server's interface for programs: images by their address, and what is no image."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serve_cases import CLASSES, app, decoded, message_of, model, pixels_of, running
from tiny_run import write_run

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.cli import main
from ddpm_fast.commands import serve
from ddpm_fast.serving import Limits, create_app
from ddpm_fast.training.pictures import read_png

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def client():
    with running(app(name="a zoo")) as client:
        yield client


def post(client, **values):
    response = client.post("/api/images", json=values)
    assert response.status_code == 200, response.text
    return response


# Images ------------------------------------------------------------------------------------


def test_images_have_the_pixels_of_their_addresses(client):
    answer = post(client, seed=7, sample_ids=[4711, 3, 2**63 - 1], steps=6, **{"class": "dog"})
    for image, i in zip(answer.json()["images"], (4711, 3, 2**63 - 1), strict=True):
        assert np.array_equal(decoded(image["png"]), pixels_of(7, i, 1, 6))
        told = {key: value for key, value in image.items() if key not in ("png", "url")}
        assert told == {"seed": 7, "id": i, "class": 1, "class_name": "dog", "steps": 6}


def test_what_is_left_out_is_the_servers(client):
    (image,) = post(client).json()["images"]
    assert (image["seed"], image["id"], image["class"], image["steps"]) == (0, 0, 0, 10)
    images = post(client, first_id=5, count=4).json()["images"]
    assert [(image["id"], image["class"]) for image in images] == [(5, 1), (6, 2), (7, 3), (8, 0)]


def test_seeds_and_ids_may_be_strings_of_digits(client):
    largest = {"seed": str(2**64 - 1), "sample_ids": [str(2**63 - 1)], "steps": "3"}
    (image,) = post(client, **largest).json()["images"]
    assert image["seed"] == 2**64 - 1
    assert np.array_equal(decoded(image["png"]), pixels_of(2**64 - 1, 2**63 - 1, 3, 3))


@pytest.mark.parametrize(
    ("given", "label"),
    [("cat", 0), (2, 2), ("a bird", 3), ("3", 2), ("1", 1), ("0", 0)],
    ids=str,
)
def test_a_class_is_a_name_or_a_number_where_it_is_no_name(client, given, label):
    (image,) = post(client, **{"class": given}).json()["images"]
    assert image["class"] == label
    assert image["class_name"] == CLASSES[label]


def test_a_class_for_each_image(client):
    images = post(client, count=3, steps=2, **{"class": ["dog", 0, "a bird"]}).json()["images"]
    assert [image["class"] for image in images] == [1, 0, 3]
    for image in images:
        assert np.array_equal(decoded(image["png"]), pixels_of(0, image["id"], image["class"], 2))


def test_guidance(client):
    for scale in (0, 1, 2.5, -1):
        (image,) = post(client, seed=1, guidance_scale=scale, steps=4).json()["images"]
        assert image["guidance_scale"] == scale
        assert np.array_equal(decoded(image["png"]), pixels_of(1, 0, 0, 4, float(scale)))
    (image,) = post(client, seed=1, guidance_scale=None, steps=4).json()["images"]
    assert "guidance_scale" not in image


def test_a_samplers_own_guidance_is_that_of_requests_which_name_none():
    sampler = Sampler(model, NoiseSchedule.linear(50), num_steps=4, guidance_scale=2.0)
    with running(create_app(sampler, [3, 4, 5], classes=4)) as client:
        assert client.get("/api/model").json()["guidance"]["default"] == 2.0
        (guided,) = post(client, seed=1).json()["images"]
        (plain,) = post(client, seed=1, guidance_scale=None).json()["images"]
    assert np.array_equal(decoded(guided["png"]), pixels_of(1, 0, 0, 4, 2.0))
    assert np.array_equal(decoded(plain["png"]), pixels_of(1, 0, 0, 4))


def test_png_is_an_image_or_a_sheet_of_them(client):
    one = post(client, seed=3, format="png")
    assert one.headers["content-type"] == "image/png"
    assert np.array_equal(decoded(one.content), pixels_of(3, 0, 0, 10))
    sheet = decoded(post(client, seed=3, count=3, format="png").content)
    assert sheet.shape == (4 + 4, 3 * 7 + 2, 3)
    assert np.array_equal(sheet[2:6, 9:14], pixels_of(3, 1, 1, 10))


def test_a_file_says_what_it_is(client):
    file = client.get("/api/images/3/5.png?class=dog&steps=4&guidance_scale=1.5")
    with Image.open(io.BytesIO(file.content)) as image:
        told = json.loads(image.info["ddpm_fast"])
    fingerprint = client.get("/api/model").json()["fingerprint"]
    assert told["model"] == fingerprint
    assert (told["seed"], told["id"], told["class"], told["steps"]) == (3, 5, 1, 4)
    assert told["guidance_scale"] == 1.5


# Addresses ---------------------------------------------------------------------------------


def test_an_image_has_a_url_that_gives_the_same_file(client):
    asked = {"seed": 9, "sample_ids": [12], "class": "cat", "steps": 5, "guidance_scale": 1.5}
    (image,) = post(client, **asked).json()["images"]
    file = client.get(image["url"])
    assert file.headers["content-type"] == "image/png"
    assert decoded(file.content).tolist() == decoded(image["png"]).tolist()
    assert file.content == post(client, **asked, format="png").content
    assert (
        file.content
        == client.get("/api/images/9/12.png?class=0&steps=5&guidance_scale=15e-1").content
    )


def test_a_url_leads_to_its_own_class_whatever_the_names_are(client):
    for image in post(client, count=4, steps=2, seed=1).json()["images"]:
        assert client.get(image["url"]).content == base64.b64decode(image["png"])
    assert post(client, **{"class": 3}).json()["images"][0]["url"].count("class=a%20bird")


def test_what_was_fetched_is_not_drawn_again(client):
    url = "/api/images/9/12.png?steps=5"
    first = client.get(url)
    drawn = client.get("/api/status").json()["drawn"]
    for known in (first.headers["etag"], f'"x", W/{first.headers["etag"]}', "*"):
        again = client.get(url, headers={"if-none-match": known})
        assert again.status_code == 304
        assert again.headers["etag"] == first.headers["etag"]
        assert not again.content
    assert client.get("/api/status").json()["drawn"] == drawn
    assert client.get(url, headers={"if-none-match": '"x"'}).status_code == 200
    others = [
        "9/12.png?steps=6",
        "9/13.png?steps=5",
        "8/12.png?steps=5",
        "9/12.png?steps=5&class=1",
    ]
    tags = {client.get(f"/api/images/{other}").headers["etag"] for other in others}
    assert len(tags | {first.headers["etag"]}) == 5


def test_a_url_that_names_the_model_is_for_ever(client):
    fingerprint = client.get("/api/model").json()["fingerprint"]
    kept = client.get(f"/api/images/1/2.png?model={fingerprint}")
    assert "immutable" in kept.headers["cache-control"]
    assert "no-cache" in client.get("/api/images/1/2.png").headers["cache-control"]
    other = client.get("/api/images/1/2.png?model=0123")
    assert other.status_code == 404
    assert other.json()["error"]["field"] == "model"


def test_other_weights_are_another_model():
    def fingerprint(weight):
        net = torch.nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            net.weight.fill_(weight)
            net.bias.fill_(0)
        sampler = Sampler(Plain(net).eval(), NoiseSchedule.linear(50))
        return create_app(sampler, [3, 4, 4]).state.service.offer.fingerprint

    class Plain(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    assert fingerprint(0.1) == fingerprint(0.1)
    assert fingerprint(0.1) != fingerprint(0.2)


@pytest.mark.parametrize("steps", [None, 7, 20])
@pytest.mark.parametrize("scale", [None, 1.5])
def test_images_are_those_that_sample_writes(tmp_path, steps, scale):
    run = write_run(tmp_path / "tiny")
    options = ["--quiet", "--seed", "7", "--num", "3", "--out", str(tmp_path / "out")]
    options += [] if steps is None else ["--num-steps", str(steps)]
    options += [] if scale is None else ["--guidance", str(scale)]
    assert main(["sample", str(run), *options]) == 0
    with running(served(run)) as client:
        values = {"seed": 7, "count": 3, "guidance_scale": scale}
        values.update({} if steps is None else {"steps": steps})
        images = post(client, **values).json()["images"]
    for i, image in enumerate(images):
        assert np.array_equal(decoded(image["png"]), read_png(tmp_path / f"out/00000{i}.png")[0])


def served(run, *options):
    """The application of a command line."""
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["serve", str(run), *options])
    application, _ = serve._app(arguments, Limits(max_batch=4), local=True)
    return application


# What is offered ---------------------------------------------------------------------------


def test_the_model_says_what_may_be_asked(client):
    told = client.get("/api/model").json()
    assert told["name"] == "a zoo"
    assert told["shape"] == [3, 4, 5]
    assert told["classes"] == list(CLASSES)
    assert told["steps"] == {"least": 1, "most": 50, "default": 10}
    assert told["guidance"] == {"available": True, "most": 100.0, "default": None}
    assert told["limits"]["images"] == 12
    assert told["device"] == "cpu"


def test_a_run_says_what_it_has_learned(tmp_path):
    told = {}
    for name, options in {"a": {}, "b": {"label_dropout": 0.0}, "c": {"num_classes": None}}.items():
        with running(served(write_run(tmp_path / name, **options))) as client:
            told[name] = client.get("/api/model").json()
            guided = client.post("/api/images", json={"guidance_scale": 2})
            assert guided.status_code == (200 if name == "a" else 422)
    assert told["a"]["name"] == "a, step 200"
    assert [told[name]["guidance"]["available"] for name in "abc"] == [True, False, False]
    assert told["b"]["classes"] == [str(i) for i in range(10)]
    assert told["c"]["classes"] is None


def test_status_and_health(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    before = client.get("/api/status").json()
    post(client, count=5)
    after = client.get("/api/status").json()
    assert after["drawn"] == before["drawn"] + 5
    assert (after["waiting"], after["running"], after["requests"]) == (0, 0, 0)
    assert after["uptime_seconds"] > before["uptime_seconds"]
    assert after["draining"] is False


def test_the_page_and_its_files_come_from_here_alone(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    for file in ("style.css", "page.js", "requests.js", "tiles.js", "icon.svg"):
        answer = client.get(f"/{file}")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
    assert client.head("/").status_code == 200


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


def test_it_is_an_asgi_application_for_any_server():
    async def ask():
        transport = httpx.ASGITransport(app=app())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/api/images", json={"seed": 2, "format": "png"})

    assert np.array_equal(decoded(asyncio.run(ask()).content), pixels_of(2, 0, 0, 10))
