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
from serve_cases import CLASSES, app, decoded, model, pixels_of, post, running
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


def test_a_head_is_told_without_drawing(client):
    drawn = client.get("/api/status").json()["drawn"]
    head = client.head("/api/images/9/13.png?steps=5")
    assert client.get("/api/status").json()["drawn"] == drawn
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == client.get("/api/images/9/13.png?steps=5").headers["etag"]


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


def test_it_is_an_asgi_application_for_any_server():
    async def ask():
        transport = httpx.ASGITransport(app=app())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/api/images", json={"seed": 2, "format": "png"})

    assert np.array_equal(decoded(asyncio.run(ask()).content), pixels_of(2, 0, 0, 10))
