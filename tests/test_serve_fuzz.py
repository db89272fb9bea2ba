"""Whatever is sent, the server answers with images or with what was wrong, and stays up."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_cases import Raw, app, idle, message_of, running
from session_cases import wait_for

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIELDS = [
    "seed",
    "sample_ids",
    "first_id",
    "count",
    "class",
    "steps",
    "guidance_scale",
    "format",
    "watch",
    "frames",
]
NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from([2**63, 2**64, 10**40, 10**400, -(10**400)]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=9),
    st.sampled_from(["cat", "dog", "3", "png", "json", "both", "x0", "\ud800", "0" * 30]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=14), st.dictionaries(st.text(), SCALARS))
BODIES = st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), VALUES)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(-1, 2**64),
        "first_id": st.integers(-1, 2**63),
        "count": st.integers(0, 13),
        "class": st.sampled_from(["cat", 3, 4, "horse", None, ["dog"], ["dog", 1]]),
        "steps": st.integers(0, 51),
        "guidance_scale": st.one_of(st.none(), st.floats(-101, 101)),
    },
)


@pytest.fixture(scope="module")
def server():
    application = app()
    with running(application) as client:
        yield client, application.state.service
        wait_for(lambda: idle(application.state.service))
        assert client.get("/healthz").status_code == 200


def check(answer):
    assert answer.status_code in (200, 400, 404, 413, 415, 422), answer.text
    if answer.status_code != 200:
        assert len(message_of(answer)) < 600


@FEW
@given(BODIES | LIKELY, st.sampled_from(["/api/images", "/api/live"]))
def test_any_object(server, body, path):
    client, _ = server
    content = json.dumps(body).encode()  # NaN and infinities among it, which JSON has not
    check(client.post(path, content=content, headers={"content-type": "application/json"}))


@FEW
@given(st.one_of(st.binary(max_size=200), BODIES.map(lambda body: json.dumps(body)[:-1].encode())))
def test_any_bytes(server, body):
    client, _ = server
    headers = {"content-type": "application/json"}
    check(client.post("/api/images", content=body, headers=headers))


@FEW
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["class", "steps", "guidance_scale", "model", "x"]),
            st.text(max_size=8),
        ),
        max_size=3,
    ),
    st.text("0123456789-x", min_size=1, max_size=21),
    st.text("0123456789-x", min_size=1, max_size=21),
)
def test_any_address(server, query, seed, sample_id):
    client, _ = server
    query = [(name, value.encode(errors="replace").decode()) for name, value in query]
    check(client.get(f"/api/images/{seed}/{sample_id}.png", params=query))


@FEW
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_for_a_request(server, data, begun):
    client, _ = server
    with Raw(client) as raw:
        raw.send(b"POST /api/images HTTP/1.1\r\n" * begun + data + b"\r\n\r\n")
        raw.socket.shutdown(1)  # no more is to come
        answer = raw.rest()
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    wait_for(lambda: idle(server[1]))
