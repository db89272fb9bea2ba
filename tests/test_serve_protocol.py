"""The server at the edges of HTTP: heads, targets, what comes too early, too many connections."""

from __future__ import annotations

import json
import resource
import time

import pytest
import torch
from serve_cases import LIMITS, Raw, app, gated, idle, in_thread, message_of, post, running
from session_cases import SECONDS, wait_for

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.serving import Limits, create_app, site
from ddpm_fast.serving.descriptors import fitting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def client():
    with running(app()) as client:
        yield client


def asked(client, text):
    """The answer to it, until the server closes: its head, and its body's JSON."""
    with Raw(client) as raw:
        raw.send(text)
        head, _, body = raw.rest().partition(b"\r\n\r\n")
    return head.decode().lower(), json.loads(body)


# Heads -------------------------------------------------------------------------------------


def test_a_head_of_any_size_hears_why(client):
    for size in (20_000, 300_000):
        head, body = asked(client, f"GET / HTTP/1.1\r\nhost: localhost\r\nx: {'y' * size}\r\n\r\n")
        assert head.startswith("http/1.1 431")
        assert "16384 bytes" in body["error"]["message"]


@pytest.mark.parametrize("hosts", ["", "host: localhost\r\nhost: localhost\r\n"])
def test_one_host(client, hosts):
    head, body = asked(client, f"GET / HTTP/1.1\r\n{hosts}\r\n")
    assert head.startswith("http/1.1 400")
    assert "one Host header" in body["error"]["message"]


def test_a_target_may_be_a_url_whose_host_counts(client):
    rest = "HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n"
    for target, host, status in (
        ("http://localhost:8000/healthz", "localhost", 200),
        ("HTTP://127.0.0.1/healthz?x=1", "evil.example", 200),
        ("http://evil.example/healthz", "localhost", 421),
        ("http://localhost", "localhost", 200),
    ):
        with Raw(client) as raw:
            raw.send(f"GET {target} {rest.format(host)}")
            assert raw.rest().startswith(f"HTTP/1.1 {status}".encode())


def test_a_head_tells_no_length_that_the_image_has_not(client):
    head = client.head("/api/images/9/13.png?steps=5")
    assert head.status_code == 200
    assert "content-length" not in head.headers
    assert head.headers["content-type"] == "image/png"


def test_what_is_known_may_stand_in_several_headers(client):
    url = "/api/images/9/12.png?steps=5"
    etag = client.head(url).headers["etag"]
    headers = [("if-none-match", '"x"'), ("if-none-match", etag), ("if-none-match", '"y"')]
    assert client.get(url, headers=headers).status_code == 304


def test_who_asks_whether_to_send_too_much_is_told_not_to(client):
    head = (
        "POST /api/images HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "expect: 100-continue\r\ncontent-length: {}\r\n\r\n"
    )
    told, body = asked(client, head.format(10**8))
    assert told.startswith("http/1.1 413")
    assert str(LIMITS.body_bytes) in body["error"]["message"]
    with Raw(client) as raw:
        raw.send(head.format(2))
        assert raw.socket.recv(25).startswith(b"HTTP/1.1 100")
        raw.send(b"{}")
        assert raw.answer().partition(b"HTTP/1.1 ")[2].startswith(b"200")


@pytest.mark.parametrize("digits", [1001, 4301, 5001])
def test_a_number_without_end(client, digits):
    headers = {"content-type": "application/json"}
    body = b'{"guidance_scale": 1' + b"0" * (digits - 1) + b"}"
    answer = client.post("/api/images", content=body, headers=headers)
    assert answer.status_code == 400
    assert message_of(answer) == f"a number must have at most 1000 digits; got {digits}"


def test_a_scale_beyond_any_float_is_out_of_range(client):
    for scale in (10**400, -(10**400)):
        body = json.dumps({"guidance_scale": scale})
        headers = {"content-type": "application/json"}
        answer = client.post("/api/images", content=body, headers=headers)
        assert answer.status_code == 422
        assert "-100 … 100" in message_of(answer)


# Clients that go, or read slowly -----------------------------------------------------------


@pytest.mark.parametrize("more", [b"\r\n", b"GET / HTTP/1.1\r\n", b"x" * 70_000])
def test_a_client_that_goes_is_noticed_whatever_it_has_sent_besides(more):
    with gated() as (gate, service, client):
        raw = Raw(client)
        raw.post("/api/images", {"count": 6})
        gate.reached()
        raw.send(more)
        if len(more) < 70_000:  # beyond what is kept it is cut
            time.sleep(0.1)
            assert service.drawing == 1
            raw.socket.close()
        wait_for(lambda: idle(service))
        wait_for(lambda: service.status()["cancelled"] == 6)
        raw.socket.close()


def test_readers_of_answers_take_no_places_of_who_draws():
    torch.manual_seed(0)
    noise = torch.rand(3, 256, 256)
    sampler = Sampler(lambda x, t: 0 * x + noise, NoiseSchedule.linear(2), clip=None)
    application = create_app(sampler, [3, 256, 256], limits=Limits(max_requests=1, max_images=24))
    service = application.state.service
    with running(application) as client:
        with Raw(client, receive_buffer=4096) as raw:
            raw.post("/api/images", {"count": 24})  # 6 MB, more than sockets hold
            wait_for(lambda: service.status()["drawn"] == 24)
            wait_for(lambda: not service.drawing)
            assert service.requests == 1
            assert client.get("/api/images/1/1.png").status_code == 200
            assert service.requests == 1
        wait_for(lambda: idle(service))


@pytest.mark.parametrize(("form", "name"), [("json", "listed"), ("png", "together")])
def test_others_are_answered_while_a_large_answer_is_made(monkeypatch, form, name):
    """Its making lasts until another request was answered."""
    answered, plain = [], getattr(site, name)

    def slow(*arguments):
        end = time.monotonic() + SECONDS
        while not answered and time.monotonic() < end:
            time.sleep(0.01)
        assert answered
        return plain(*arguments)

    monkeypatch.setattr(site, name, slow)
    with running(application := app()) as client:
        waiting = in_thread(post, client, count=2, format=form)
        wait_for(lambda: application.state.service.status()["drawn"] == 2)
        assert client.get("/healthz").status_code == 200
        answered.append(True)
        assert waiting().status_code == 200


# As many connections as files --------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "hard", "raising", "kept", "then"),
    [
        (4096, 4096, True, 512, 4096),
        (100, 4096, True, 512, None),
        (100, 4096, False, 1, 100),
        (400, 400, True, None, 400),
    ],
)
def test_connections_fit_the_files_that_may_be_open(monkeypatch, soft, hard, raising, kept, then):
    bound = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: bound[0])
    monkeypatch.setattr(resource, "setrlimit", lambda which, value: bound.insert(0, value))
    found = fitting(512, 16, raising)
    if kept is not None:
        assert found == kept
    else:
        assert 1 < found < 400 - 16
    assert bound[0][1] == hard
    assert bound[0][0] == then if then is not None else bound[0][0] > 512 + 16
