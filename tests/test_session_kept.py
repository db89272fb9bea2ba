"""What a session keeps of samples that are finished, and who is told why it ended."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from session_cases import SECONDS, SHAPE, alone, exact, gated, maker, wait_for

import ddpm_fast
from ddpm_fast.sessions import SessionClosed, threads

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=4)


def is_right(handle):
    expected = alone(MAKE, SHAPE, sample_id=handle.sample_id, num_steps=handle.num_steps)
    return torch.equal(handle.result(SECONDS), expected)


def ask_and_leave(session, **arguments):
    """A request that times out; its handle is dropped."""
    handle = session.submit(**arguments)
    with pytest.raises(concurrent.futures.TimeoutError):
        handle.result(timeout=0)
    return weakref.ref(handle)


def test_who_asked_and_left_is_forgotten():
    gate, session = gated(max_batch=2)
    with session:
        gone = [ask_and_leave(session, sample_id=i) for i in range(5)]
        kept = session.submit(sample_id=5)
        with pytest.raises(concurrent.futures.TimeoutError):
            kept.result(timeout=0)
        never = session.submit(sample_id=6)  # has not been asked for
        gate.open()
        wait_for(lambda: not (session.running or session.waiting))
        wait_for(never.done)
        wait_for(lambda: not session._book.stepping)
        never = weakref.ref(never)
        gc.collect()
        assert [each() for each in gone] == [None] * 5
        found = list(session)
    assert found == [kept, never()]
    assert all(map(is_right, found))


def test_an_iterator_that_waits_is_given_what_others_left():
    gate, session = gated(num_steps=1, max_batch=1)
    with session:
        ask_and_leave(session, sample_id=1)
        promise = session._book.next_finished()
        gate.open()
        handle = promise.result(SECONDS)
        assert is_right_of(handle, 1)


def is_right_of(handle, sample_id):
    expected = alone(MAKE, SHAPE, sample_id=sample_id, num_steps=1)
    return torch.equal(handle.result(SECONDS), expected)


def finished_one_by_one(session, numbers):
    for i in numbers:
        done = threading.Event()
        session.submit(sample_id=i).add_done_callback(lambda _, done=done: done.set())
        assert done.wait(SECONDS)
        wait_for(lambda: not session._book.stepping)


def test_of_those_that_nobody_wants_the_last_are_kept():
    with MAKE().session(SHAPE, max_batch=2, max_waiting=1) as session:
        finished_one_by_one(session, range(7))
        gc.collect()
        with pytest.warns(UserWarning, match="4 finished samples are not among") as seen:
            found = list(session)
        assert [each.filename for each in seen] == [__file__]
        assert [handle.sample_id for handle in found] == [4, 5, 6]
        assert all(map(is_right, found))
        # Who iterates takes what there is, however late
        finished_one_by_one(session, range(10))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [handle.sample_id for handle in session] == list(range(10))


def test_handles_that_somebody_has_are_iterated_over():
    with MAKE().session(SHAPE, max_batch=2, max_waiting=30) as session:
        session.max_waiting = session._book.max_waiting = 0
        handles = []
        for i in range(9):
            handles.append(session.submit(sample_id=i))
            wait_for(handles[-1].done)
            wait_for(lambda: not session._book.stepping)
        handles[3].result()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(session) == [*handles[:3], *handles[4:]]


@pytest.mark.parametrize("how", ["finished", "cancelled", "waiting"])
def test_a_handle_keeps_no_arguments(how):
    gate, session = gated(num_steps=2, max_batch=1)
    with session:
        first = session.submit() if how == "waiting" else None
        value = torch.tensor([0.5])
        handle = session.submit(model_kwargs={"a": value})
        gone = weakref.ref(value)
        del value
        gate.reached()
        if how != "finished":
            assert handle.cancel()
        gate.open()
        session.submit(sample_id=1).result(SECONDS)
        gc.collect()
        assert gone() is None
    assert handle.done()
    assert first is None or first.done()


# Failures --------------------------------------------------------------------------------------


def test_no_memory_for_what_lands_costs_its_samples_alone(monkeypatch):
    gate, session = gated(max_batch=3)
    land, error = session._flight._land, MemoryError("no more")

    def once(done):
        monkeypatch.setattr(session._flight, "_land", land)
        raise error

    monkeypatch.setattr(session._flight, "_land", once)
    with session:
        with session._worker.paused():
            handles = [session.submit(sample_id=i, num_steps=1 + i // 2) for i in range(5)]
        gate.open()
        assert [handle.exception(SECONDS) for handle in handles[:2]] == [error] * 2
        assert all(map(is_right, handles[2:]))
        assert is_right(session.submit(sample_id=7))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OSError("a bug"), SystemExit(3)])
def test_why_a_session_ended(error, monkeypatch):
    gate, session = gated(num_steps=1, max_batch=1)

    def fail(*_, **__):
        raise error

    gate.open()
    if isinstance(error, SystemExit):
        session.submit().add_done_callback(fail)
    else:
        monkeypatch.setattr(session._flight, "step", fail)
        assert session.submit().exception(SECONDS) is error
    wait_for(lambda: session._book.closed)
    with pytest.raises(SessionClosed, match="an error ended it: ") as closed:
        session.submit()
    assert closed.value.__cause__ is error
    session.close()


# Threads ---------------------------------------------------------------------------------------


@pytest.fixture
def released(monkeypatch):
    """Threads that have ended OpenMP's."""
    found = []
    native = SimpleNamespace(release_threads=lambda: found.append(threading.current_thread()))
    monkeypatch.setattr(threads, "native", native)
    return found


@pytest.mark.parametrize("how", ["iteration", "close", "save", "result"])
def test_who_waits_lets_go_of_its_threads(how, released, tmp_path):
    gate, session = gated(num_steps=2, max_batch=1)
    handle = session.submit()
    gate.reached()
    released.clear()
    ways = {
        "iteration": lambda: list(session),
        "close": session.close,
        "save": lambda: session.save(tmp_path),
        "result": handle.result,
    }
    waiting = threading.Thread(target=ways[how])
    waiting.start()
    wait_for(lambda: waiting in released)
    gate.open()
    waiting.join(SECONDS)
    session.close()


def test_callbacks_leave_the_session_its_threads(released, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.sessions.worker._PAUSE_SECONDS", SECONDS)
    gate, session = gated(num_steps=1, max_batch=1)
    seen = []

    def then(_):
        session.save(tmp_path)
        with pytest.raises(concurrent.futures.TimeoutError):
            other.result(timeout=0)
        session.submit(sample_id=2)
        seen.append(session._book.thread in released)

    handle, other = session.submit(), session.submit(sample_id=1)
    gate.reached()
    handle.add_done_callback(then)
    gate.open()
    other.result(SECONDS)
    assert seen == [False]
    session.close()


def test_names():
    for name in ("Session", "SessionFull", "SessionClosed", "Handle", "InUseError"):
        assert name in ddpm_fast.__all__
        assert getattr(ddpm_fast, name).__name__ == name
