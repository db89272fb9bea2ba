"""A session among threads: those that ask, those that wait, its own, and what ends them."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from session_cases import SECONDS, SHAPE, alone, exact, gated, maker

from ddpm_fast.sessions import SessionClosed

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=4)


def is_right(handle):
    return torch.equal(
        handle.result(SECONDS),
        alone(MAKE, SHAPE, sample_id=handle.sample_id, num_steps=handle.num_steps),
    )


@pytest.fixture
def many_switches():
    """Between threads: races show that would take hours."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# Those who ask ---------------------------------------------------------------------------------


def test_many_ask_and_cancel(many_switches):
    def ask(who):
        chance = random.Random(who)
        kept, cancelled = [], 0
        for i in range(60):
            number = 1 + chance.randrange(9)
            handle = session.submit(sample_id=100 * who + i, num_steps=number)
            if chance.random() < 0.3:
                cancelled += handle.cancel()
            if chance.random() < 0.3:
                handle.exception(SECONDS) if not handle.cancelled() else None
            kept.append(handle)
        return kept, cancelled

    with MAKE().session(SHAPE, max_batch=5) as session, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    handles = [handle for kept, _ in found for handle in kept]
    assert sum(handle.cancelled() for handle in handles) == sum(count for _, count in found)
    assert all(is_right(handle) for handle in handles if not handle.cancelled())
    assert (session.running, session.waiting) == (0, 0)


def test_several_wait_for_one():
    gate, session = gated()
    with session, ThreadPoolExecutor(4) as pool:
        handle = session.submit(sample_id=1)
        gate.reached()
        waiting = [pool.submit(handle.result, SECONDS) for _ in range(4)]
        gate.open()
        found = [each.result(SECONDS) for each in waiting]
    assert all(x is found[0] for x in found)
    assert is_right(handle)


def test_several_iterate(many_switches):
    with MAKE().session(SHAPE, max_batch=3) as session, ThreadPoolExecutor(5) as pool:
        handles = [session.submit(sample_id=i, num_steps=1 + i % 4) for i in range(60)]
        parts = list(pool.map(lambda _: list(session), range(5)))
    assert sorted(handle.sample_id for part in parts for handle in part) == list(range(60))
    assert all(map(is_right, handles))


def test_iterators_are_released_when_the_rest_is_cancelled():
    gate, session = gated(max_batch=1)
    with session, ThreadPoolExecutor(3) as pool:
        handles = [session.submit(sample_id=i) for i in range(3)]
        gate.reached()
        parts = [pool.submit(list, session) for _ in range(3)]
        for handle in handles:
            handle.cancel()
        assert [part.result(SECONDS) for part in parts] == [[], [], []]
        gate.open()


def test_what_ends_while_iteration_begins_is_given():
    """A sample that has finished, and whose callbacks still run."""
    gate, session = gated(num_steps=1)
    entered, leave = threading.Event(), threading.Event()
    with session, ThreadPoolExecutor(2) as pool:
        handle = session.submit(sample_id=3)
        gate.reached()
        handle.add_done_callback(lambda _: (entered.set(), leave.wait(SECONDS)))
        gate.open()
        assert entered.wait(SECONDS)
        iterated = pool.submit(list, session)
        extra = session.submit(sample_id=4)
        assert extra.cancel()  # which would end an iteration that sees nothing else
        leave.set()
        assert iterated.result(SECONDS) == [handle]
        assert list(session) == []


def test_what_an_interrupted_iterator_was_given_goes_to_the_next():
    gate, session = gated(num_steps=1, max_batch=1)
    with session:
        handles = [session.submit(sample_id=i) for i in range(2)]
        gate.reached()
        first, second, third = (session._book.next_finished() for _ in range(3))
        gate.open()
        assert first.result(SECONDS) is handles[0]
        assert second.result(SECONDS) is handles[1]
        assert third.result(SECONDS) is None
        session._book.not_taken(second)
        session._book.not_taken(first)
        session._book.not_taken(third)
        assert list(session) == handles
    gate, session = gated(num_steps=1, max_batch=1)
    with session:
        handles = [session.submit(sample_id=i) for i in range(2)]
        gate.reached()
        first, second, third = (session._book.next_finished() for _ in range(3))
        gate.let()
        assert first.result(SECONDS) is handles[0]
        session._book.not_taken(first)  # while others wait
        assert second.result(SECONDS) is handles[0]
        session._book.not_taken(third)
        gate.open()
        assert list(session) == [handles[1]]


# Its own thread --------------------------------------------------------------------------------


def test_the_thread_ends_when_idle_and_another_begins(monkeypatch):
    for name in ("_IDLE_SECONDS", "_PAUSE_SECONDS"):
        monkeypatch.setattr(f"ddpm_fast.sessions.worker.{name}", 0.01)
    with MAKE().session(SHAPE, max_batch=2) as session:
        assert session._book.thread is None
        threads = set()
        for i in range(4):
            handle = session.submit(sample_id=i)
            thread = session._book.thread
            assert is_right(handle)
            thread.join(SECONDS)
            assert session._book.thread is None
            threads.add(thread)
        assert len(threads) == 4


def test_submissions_meet_a_thread_that_ends(monkeypatch, many_switches):
    for name in ("_IDLE_SECONDS", "_PAUSE_SECONDS"):
        monkeypatch.setattr(f"ddpm_fast.sessions.worker.{name}", 0.0)
    with MAKE().session(SHAPE, max_batch=2) as session:
        assert all(is_right(session.submit(sample_id=i, num_steps=1)) for i in range(200))


def test_a_session_that_is_dropped_is_forgotten(monkeypatch):
    monkeypatch.setattr("ddpm_fast.sessions.worker._IDLE_SECONDS", 0.01)
    session = MAKE().session(SHAPE, max_batch=2)
    handle, thread = session.submit(sample_id=4), session._book.thread
    dead = weakref.ref(session)
    del session
    assert is_right(handle)  # it goes on for those who have asked
    thread.join(SECONDS)
    gc.collect()
    assert dead() is None


def test_no_thread_can_be_started(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    with MAKE().session(SHAPE, max_batch=2) as session:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                session.submit(sample_id=7)
        assert session.waiting == 0
        assert list(session) == []
        assert is_right(session.submit(sample_id=5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["step", "drop"])
def test_a_thread_that_dies_takes_nobody_along(where, monkeypatch):
    gate, session = gated(max_batch=2)
    handles = [session.submit(sample_id=i) for i in range(4)]
    gate.reached()
    thread = session._book.thread
    with ThreadPoolExecutor(3) as pool:
        iterated = pool.submit(list, session)
        closing = pool.submit(session.close)
        error = OSError("a bug")

        def broken(*_, **__):
            raise error

        monkeypatch.setattr(session._flight, where, broken)
        handles[3].cancel()
        if where == "drop":
            handles[0].cancel()
        gate.open()
        assert iterated.result(SECONDS) == []
        assert closing.result(SECONDS) is None
    thread.join(SECONDS)
    assert handles[1].exception(SECONDS) is error
    assert handles[2].exception(SECONDS) is error
    with pytest.raises(SessionClosed):
        session.submit()


@pytest.mark.parametrize("cancel", [False, True])
def test_closed_by_several_while_others_ask(cancel, many_switches):
    session = MAKE().session(SHAPE, max_batch=3, max_waiting=100_000)
    begun = threading.Barrier(4)

    def ask():
        begun.wait(SECONDS)
        handles = []
        with contextlib.suppress(SessionClosed):
            while True:
                handles.append(session.submit(sample_id=len(handles)))
                time.sleep(1e-6)  # others come to the lock, too
        return handles

    def close():
        begun.wait(SECONDS)
        session.submit(num_steps=1).result(SECONDS)
        session.close(cancel=cancel)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        closing = [pool.submit(close) for _ in range(2)]
        handles = [handle for each in asking for handle in each.result(SECONDS)]
        errors = [each.exception(SECONDS) for each in closing]
    # The later of those who close may find it closed already
    assert {type(error) for error in errors} <= {type(None), SessionClosed}
    assert all(handle.done() for handle in handles)
    ends = [handle.exception() for handle in handles]
    assert {type(error) for error in ends} <= {type(None), SessionClosed if cancel else type(None)}
    assert cancel or set(ends) == {None}


# Processes -------------------------------------------------------------------------------------

PREPARED = """
import asyncio, signal, sys, threading, time
import torch
from ddpm_fast import NoiseSchedule, Sampler
from ddpm_fast.sessions import SessionClosed
def model(x, t):
    time.sleep(0.05)  # a minute a sample
    return 0.5 * x
sampler = Sampler(model, NoiseSchedule.linear())
def busy(**arguments):
    session = sampler.session([3], max_batch=2, **arguments)
    for i in range(5):
        session.submit(sample_id=i)
    return session
"""


def process(script):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARED + script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_interpreter_ends_with_work_in_sessions():
    """At once, without a word, whoever waits."""
    running = process(
        """
kept, idle = busy(), sampler.session([3], max_batch=1)
busy()
closed = busy()
closed.close(cancel=True)
threading.Thread(target=lambda: list(kept), daemon=True).start()
threading.Thread(target=kept.submit().exception).start()
def again(handle):
    print(type(handle.exception()).__name__)
kept.submit().add_done_callback(again)
threading.Timer(0.1, kept.close, kwargs={"cancel": True}).start()
busy().submit().add_done_callback(again)
"""
    )
    said, errors = running.communicate(timeout=SECONDS)
    assert errors == ""
    assert said == "SessionClosed\n" * 2
    assert running.returncode == 0


def test_the_interpreter_ends_while_a_session_is_being_saved():
    """However long that takes."""
    running = process(
        """
session = busy()
held, entered = threading.Event(), threading.Event()
def save():
    with session._worker.paused():
        entered.set()
        held.wait()
threading.Thread(target=save, daemon=True).start()
assert entered.wait(30)
print("leaves", flush=True)
"""
    )
    said, errors = running.communicate(timeout=SECONDS / 2)
    assert (said, errors, running.returncode) == ("leaves\n", "", 0)


INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)
def soon():
    threading.Timer(0.3, print, ["ready"], {"flush": True}).start()
def result():
    with busy() as session:
        handles.append(session.submit())
        soon()
        handles[-1].result()
def end_of_block():
    with busy() as session:
        handles.append(session.submit())
        soon()
def iteration():
    with busy() as session:
        handles.append(session.submit())
        soon()
        for handle in session:
            pass
def closing():
    session = busy()
    handles.append(session.submit())
    soon()
    session.close()
async def loop(kind):
    async with busy() as session:
        handles.append(session.submit())
        soon()
        if kind == "await":
            await handles[-1]
        elif kind == "iterate":
            async for handle in session:
                pass
for way in (result, end_of_block, iteration, closing, "await", "iterate", "end of block"):
    handles = []
    try:
        asyncio.run(loop(way)) if isinstance(way, str) else way()
    except KeyboardInterrupt:
        (handle,) = handles
        try:
            handle.result(timeout=30)
        except BaseException as error:
            print(type(error).__name__, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupts():
    """Ctrl-C, wherever the main thread waits, gives up what is not finished."""
    running = process(INTERRUPTED)
    said = []
    timer = threading.Timer(SECONDS, running.kill)
    timer.start()
    for line in running.stdout:
        if line == "ready\n":
            running.send_signal(signal.SIGINT)
        else:
            said.append(line.strip())
    timer.cancel()
    assert running.stderr.read() == ""
    assert said == ["SessionClosed"] * 4 + ["CancelledError"] + ["SessionClosed"] * 2
    assert running.wait(SECONDS) == 0
