"""How a server ends: what runs is finished and answered, and nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from forked_commands import Forks
from serve_cases import Raw, app, decoded, events, gated, in_thread, message_of, model, running
from session_cases import SECONDS, Gated, wait_for
from tiny_run import write_run

from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.cli import main
from ddpm_fast.serving import Limits, create_app, serving, site

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW = """
import time
from ddpm_fast.nn import UNet
plain = UNet.forward
def slow(self, *arguments, **named):
    time.sleep({seconds})
    return plain(self, *arguments, **named)
UNet.forward = slow
from ddpm_fast import sampler
made = sampler.Sampler.__init__
def unplanned(self, *arguments, **named):
    made(self, *arguments, plan="off", **named)
sampler.Sampler.__init__ = unplanned
"""


class Child:
    """``ddpm-fast serve`` in a process of its own, of a model that takes its time; a context
    manager."""

    def __init__(self, forks: Forks, run: Path, seconds: float, *options: str) -> None:
        arguments = ["serve", str(run), "--port", "0", *options]
        self.process = forks.start(arguments, SLOW.format(seconds=seconds))
        self._status: tuple[int, str] | None = None
        wait_for(lambda: self._told())
        found = re.search(r"serving (.+) at (http://\S+)", self._told())
        assert found is not None
        self.name, self.url = found[1], found[2]
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False)

    def _told(self) -> str:
        out = Path(self.process._said + ".out")
        return out.read_text() if out.exists() else ""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        if self._status is None:
            self.process.kill()
            self.wait()

    def signal(self, number: int) -> None:
        self.process.kill(number)

    def wait(self) -> tuple[int, str]:
        """Its status, and what it said on stderr."""
        status, _, error = self.process.wait()
        self._status = status, error
        return self._status

    def running(self) -> bool:
        return self.client.get("/api/status").json()["running"] > 0

    def draining(self) -> bool:
        return self.client.get("/api/status").json()["draining"]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("processes")) as forks:
        yield forks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_what_runs_is_finished_and_answered(forks, run, number):
    with Child(forks, run, 0.05) as child:
        assert child.name == "tiny, step 200"
        asked = in_thread(child.client.post, "/api/images", json={"count": 2, "steps": 20})
        wait_for(child.running)
        with child.client.stream("POST", "/api/live", json={"steps": 15, "seed": 1}) as live:
            lines = events(live)
            assert next(lines)["event"] == "begin"
            child.signal(number)
            wait_for(child.draining)
            for path in ("/healthz", "/api/model", "/api/images/1/1.png", "/"):
                answer = child.client.get(path)
                assert answer.status_code == 503
            assert "shuts down" in message_of(answer)
            answer = child.client.post("/api/images", json={})
            assert answer.status_code == 503
            assert answer.headers["connection"] == "close"
            assert list(lines)[-1] == {"event": "end", "drawn": 1, "failed": 0}
        images = asked().json()["images"]
        assert [decoded(image["png"]).shape for image in images] == [(8, 8), (8, 8)]
        assert child.wait() == (0, "finishing 2 requests; again gives up\n")


def test_an_idle_server_ends_at_once(forks, run):
    with (
        Child(forks, run, 0) as child,
        Raw(child.client) as raw,
    ):  # a connection that asks for nothing
        assert child.client.get("/healthz").status_code == 200
        child.signal(signal.SIGTERM)
        assert child.wait() == (0, "")
        assert raw.rest() == b""


def test_a_second_signal_gives_up(forks, run):
    with Child(forks, run, 0.1) as child:
        asked = in_thread(child.client.post, "/api/images", json={"count": 60, "steps": 20})
        wait_for(child.running)
        child.signal(signal.SIGTERM)
        wait_for(child.draining)
        child.signal(signal.SIGINT)
        status, _ = child.wait()
        assert status == 128 + signal.SIGINT
        with contextlib.suppress(httpx.HTTPError):  # the connection was closed before
            assert asked().status_code == 503


def test_after_its_grace_it_gives_up_and_says_so_to_clients(forks, run):
    with Child(forks, run, 0.1, "--grace", "0.3") as child:
        asked = in_thread(child.client.post, "/api/images", json={"count": 60, "steps": 20})
        wait_for(child.running)
        child.signal(signal.SIGTERM)
        answer = asked()
        assert answer.status_code == 503
        assert "shuts down" in message_of(answer)
        status, _ = child.wait()
        assert status == 1


@pytest.mark.parametrize("comes", [True, False])
def test_a_body_on_its_way_is_waited_for(forks, run, comes):
    with (
        Child(forks, run, 0, "--grace", "30" if comes else "0.3") as child,
        Raw(child.client) as raw,
    ):
        raw.post("/api/images", None, b'{"count"', length=12)
        wait_for(lambda: child.client.get("/api/status").json()["requests"] == 1)
        child.signal(signal.SIGTERM)
        wait_for(child.draining) if comes else None
        raw.send(b": 2}" if comes else b"")
        head, _, body = raw.rest().partition(b"\r\n\r\n")
        if comes:
            assert head.startswith(b"HTTP/1.1 200")
            assert len(json.loads(body)["images"]) == 2
        else:
            assert head.startswith(b"HTTP/1.1 503")
            assert "shuts down" in json.loads(body)["error"]["message"]
        assert child.wait() == (0 if comes else 1, "finishing 1 request; again gives up\n")


def test_nobody_who_reads_what_it_says(run):
    """Its stdout and stderr are pipes whose readers have gone: it serves, and ends as ever."""
    port = free_port()
    command = [sys.executable, "-m", "ddpm_fast.cli", "serve", str(run), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    process = subprocess.Popen(command, stdout=write, stderr=write, env=environment)
    os.close(read)
    os.close(write)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
            wait_for(lambda: reached(client))
            with Raw(client) as raw:
                raw.post("/api/images", None, b"{", length=2)
                wait_for(lambda: client.get("/api/status").json()["requests"] == 1)
                process.send_signal(signal.SIGTERM)
                wait_for(lambda: client.get("/api/status").json()["draining"])
                raw.send(b"}")
                assert raw.rest().startswith(b"HTTP/1.1 200")
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def reached(client):
    with contextlib.suppress(httpx.TransportError):
        return client.get("/healthz").status_code == 200
    return False


# In a thread -------------------------------------------------------------------------------


def test_the_end_of_a_block_waits_for_what_was_asked_for():
    gate = Gated(model)
    application = app(gate)
    before = set(threading.enumerate())
    with serving(application) as url:
        asked = in_thread(httpx.post, f"{url}/api/images", json={"count": 3}, timeout=SECONDS)
        gate.reached()
        gate.open()
    assert len(asked().json()["images"]) == 3
    wait_for(lambda: set(threading.enumerate()) <= before)


def test_an_answer_is_sent_to_its_end_to_who_reads_late():
    """10 MB, more than sockets hold."""
    torch.manual_seed(0)
    noise = torch.rand(3, 256, 256)
    sampler = Sampler(lambda x, t: 0 * x + noise, NoiseSchedule.linear(2), clip=None)
    application = create_app(sampler, [3, 256, 256], limits=Limits(max_images=40))
    service = application.state.service
    with running(application) as client:
        raw = Raw(client, receive_buffer=4096)
        raw.post("/api/images", {"count": 40})
        wait_for(lambda: service.status()["drawn"] == 40)
        later = threading.Event()
        rest = in_thread(lambda: later.wait(SECONDS) and raw.rest())
        threading.Timer(0.5, later.set).start()  # when the server is about to end
    head, _, body = rest().partition(b"\r\n\r\n")
    raw.socket.close()
    assert len(body) > 5 << 20
    assert f"content-length: {len(body)}".encode() in head
    assert len(json.loads(body)["images"]) == 40


def test_an_exception_in_a_block_gives_up():
    gate = Gated(model)
    application = app(gate)
    threading.Timer(0.3, gate.open).start()  # the step that is under way ends some time
    with contextlib.suppress(ZeroDivisionError), serving(application) as url:
        asked = in_thread(httpx.post, f"{url}/api/images", json={"count": 8}, timeout=SECONDS)
        gate.reached()
        raise ZeroDivisionError
    assert application.state.service.status()["drawn"] == 0
    with contextlib.suppress(httpx.HTTPError):  # likewise
        assert asked().status_code == 503


def test_a_session_that_was_given_up_says_so():
    with gated() as (gate, service, client):
        asked = in_thread(client.post, "/api/images", json={"count": 3})
        gate.reached()
        closing = in_thread(service._session.close, cancel=True)
        assert asked().status_code == 503
        assert client.post("/api/images", json={}).status_code == 503
        gate.open()
        closing()


def test_the_port_of_another_server_is_taken():
    with running(app()) as client:
        port = client.base_url.port
        with pytest.raises(OSError, match="in use"), serving(app(), port=port):
            pass


# The command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid, port 0"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 0"),
        (["--max-images", "300"], "max_images must be at most max_batch + max_waiting, 272"),
        (["--guidance", "2", "--ema", "0.5"], "ema must be one of"),
        (["--eta", "0.5"], "--eta is of --method ddim"),
        (["--num-steps", "21"], "num_steps"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--host", "a..b"], "cannot listen on a..b, port 0: it is no name of a host"),
        (["--guidance", "500"], "guidance_scale must lie in -100 … 100"),
        (["--num-steps", "15", "--max-steps", "10"], "--num-steps must be at most --max-steps, 10"),
        (["--max-batch", "9999999999999999999999"], "max_batch must be at most 1,000,000,000"),
    ],
)
def test_mistakes_are_told_in_a_line(run, capsys, options, error):
    assert main(["serve", str(run), "--port", "0", *options]) == 2
    said = capsys.readouterr()
    assert error in said.err
    assert said.err.startswith("ddpm-fast serve: ")
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_batch_that_has_no_room(run, capsys, monkeypatch):
    def full(*arguments, **named):
        raise MemoryError

    monkeypatch.setattr(site, "create_app", full)
    assert main(["serve", str(run), "--port", "0", "--max-batch", "100000"]) == 2
    said = capsys.readouterr().err
    assert said == "ddpm-fast serve: no memory for a batch of 100000 images (--max-batch)\n"


def test_no_checkpoint(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--port", "x"],
        ["--grace", "-1"],
        ["--grace", "soon"],
        ["--max-batch", "0"],
    ],
)
def test_options_out_of_range(run, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(run), *options])
    said = capsys.readouterr().err
    assert options[0] in said
    assert "invalid _" not in said


def test_a_missing_package_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve", str(run)]) == 2
    assert "pip install 'ddpm_fast[serve]'" in capsys.readouterr().err


def test_beyond_the_loopback_it_warns_and_any_name_will_do(forks, run):
    with Child(forks, run, 0, "--host", "0.0.0.0") as child:
        url = child.url.replace("0.0.0.0", "127.0.0.1")
        answer = httpx.get(f"{url}/healthz", headers={"host": "anything"}, trust_env=False)
        assert answer.status_code == 200
        child.signal(signal.SIGTERM)
        status, said = child.wait()
        assert status == 0
        assert "no authentication" in said


def test_a_name_of_ones_own(forks, run):
    with Child(forks, run, 0, "--allow-host", "images.example") as child:
        for host, status in (("images.example", 200), ("localhost:1", 200), ("x.example", 421)):
            answer = child.client.get("/healthz", headers={"host": host})
            assert answer.status_code == status
