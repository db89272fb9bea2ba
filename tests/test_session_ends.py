"""How samples of a session end: cancelled, failed, closed, collected, iterated over."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import CancelledError

import pytest
import torch
from session_cases import SECONDS, SHAPE, alone, exact, gated, maker, over

from ddpm_fast.sessions import SessionClosed, SessionFull

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=4)


def is_right(handle):
    return torch.equal(
        handle.result(SECONDS),
        alone(MAKE, SHAPE, sample_id=handle.sample_id, num_steps=handle.num_steps),
    )


# Cancellation ----------------------------------------------------------------------------------


def test_cancelled_while_it_waits_and_runs_and_afterwards():
    gate, session = gated(max_batch=2)
    with session:
        first = session.submit(sample_id=0)
        gate.reached()
        others = [session.submit(sample_id=i) for i in range(1, 5)]
        assert first.running()
        assert not others[0].running()
        assert others[2].cancel()
        assert session.waiting == 3
        gate.let()
        assert others[0].running()
        assert (first.step, others[0].step) == (1, 0)
        assert first.cancel()
        assert session.running == 1
        gate.let()  # the step that it was in
        assert gate.sizes == [1, 2, 2]
        assert others[1].running()
        gate.open()
        assert is_right(others[0])
    assert not others[0].cancel()
    assert is_right(others[1])
    assert is_right(others[3])
    for handle in (first, others[2]):
        assert handle.cancel()  # twice
        assert handle.cancelled()
        assert handle.done()
        assert not handle.running()
        with pytest.raises(CancelledError):
            handle.result()
        with pytest.raises(CancelledError):
            handle.exception()
    # 0 took its second step to nobody's use; the others have taken theirs
    assert sum(gate.sizes) == 2 + 3 * 4


def test_all_cancelled():
    gate, session = gated()
    with session:
        handles = [session.submit(sample_id=i) for i in range(9)]
        gate.reached()
        assert all(handle.cancel() for handle in handles)
        assert (session.running, session.waiting) == (0, 0)
        assert list(session) == []
        gate.open()
        assert is_right(session.submit(sample_id=3))


def test_cancelled_from_callbacks():
    """Of one that finishes in the same step, of one that runs and one that waits."""
    gate, session = gated(num_steps=2, max_batch=3)
    with session:
        first = session.submit(sample_id=0)
        gate.reached()
        together = [session.submit(sample_id=i, num_steps=1) for i in (1, 2)]
        waits = session.submit(sample_id=3)
        found = []
        first.add_done_callback(
            lambda _: found.extend([together[1].cancel(), together[1].done(), waits.cancel()])
        )
        together[0].add_done_callback(lambda handle: found.append(handle.cancel()))
        gate.open()
        assert [is_right(handle) for handle in (first, *together)] == [True] * 3
        assert found[0] is False  # its result was on its way, as it is for all three
        assert found[2] is True
        assert found[3] is False
    assert waits.cancelled()


def test_a_bound_on_what_waits():
    gate, session = gated(max_batch=2, max_waiting=1)
    with session:
        handles = [session.submit(sample_id=0)]
        gate.reached()
        handles += [session.submit(sample_id=i) for i in (1, 2)]
        full = r"2 samples wait for a place in the batch of 2, and max_waiting is 1: take results"
        with pytest.raises(SessionFull, match=full):
            session.submit(sample_id=3)
        handles[1].cancel()
        handles.append(session.submit(sample_id=4))
        with pytest.raises(SessionFull):
            session.submit(sample_id=5)
        gate.open()
        assert is_right(handles[0])
        while session.waiting or session.running:
            handles[3].exception(SECONDS)
            handles[2].exception(SECONDS)
        assert is_right(session.submit(sample_id=6))
    assert is_right(handles[2])
    assert is_right(handles[3])


@pytest.mark.parametrize("max_batch", [1, 3])
def test_nothing_may_wait(max_batch):
    gate, session = gated(max_batch=max_batch, max_waiting=0)
    with session:
        handles = [session.submit(sample_id=i) for i in range(max_batch)]
        with pytest.raises(SessionFull):
            session.submit()
        gate.reached()
        gate.open()
        assert all(map(is_right, handles))
        assert all(map(is_right, [session.submit(sample_id=i) for i in range(max_batch)]))
    assert max(gate.sizes) <= max_batch


# Failures --------------------------------------------------------------------------------------


def test_a_model_that_fails_for_one():
    def model(x, t, c):
        sizes.append(x.shape[0])
        if bool((c > 2).any()):
            raise IndexError(f"class {int(c.max())}")
        return exact(x, t, c=c)

    sizes = []
    make = maker(model)
    asked = [
        {"sample_id": i, "num_steps": 3 + i % 2, "model_kwargs": {"c": torch.tensor([c])}}
        for i, c in enumerate([0, 1, 5, 2, 0, 9])
    ]
    with make().session(SHAPE, max_batch=4) as session:
        handles = [session.submit(**arguments) for arguments in asked]
    for i, (handle, arguments) in enumerate(zip(handles, asked, strict=True)):
        if i in (2, 5):
            with pytest.raises(IndexError, match=f"class {[0, 1, 5, 2, 0, 9][i]}"):
                handle.result()
            assert handle.step == 0
        else:
            assert torch.equal(handle.result(), alone(make, SHAPE, **arguments))
            assert handle.step == handle.num_steps
    assert set(session) == set()  # all were taken


def test_a_model_that_always_fails():
    def model(x, t):
        raise OSError("gone")

    with maker(model)().session(SHAPE, max_batch=3) as session:
        handles = [session.submit(sample_id=i) for i in range(7)]
        for handle in handles:
            assert isinstance(handle.exception(SECONDS), OSError)
            with pytest.raises(OSError, match="gone"):
                handle.result()
    with maker(exact)().session(SHAPE, max_batch=3) as session:
        assert torch.equal(session.submit().result(SECONDS), alone(maker(exact), SHAPE))


def test_nan_for_one():
    def model(x, t, at):
        return torch.where(over(at == t, x).bool(), torch.nan, exact(x, t))

    make = maker(model, num_steps=10)
    bad = make().table.timesteps.tolist()[3]
    asked = [
        {"sample_id": i, "model_kwargs": {"at": torch.tensor([bad if i == 1 else -1])}}
        for i in range(4)
    ]
    with make().session(SHAPE, max_batch=3) as session:
        handles = [session.submit(**arguments) for arguments in asked]
    for i, (handle, arguments) in enumerate(zip(handles, asked, strict=True)):
        if i == 1:
            with pytest.raises(FloatingPointError, match=f"NaN at step 3, t = {bad}:"):
                handle.result()
            assert handle.step == 3
        else:
            assert torch.equal(handle.result(), alone(make, SHAPE, **arguments))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            lambda x, t: x[..., :2],
            ValueError,
            r"shape \[\d, 2, 3, 4\].*session.*got \[\d, 2, 3, 2\]",
        ),
        (lambda x, t: x.double(), ValueError, "float tensor"),
        (lambda x, t: "x", TypeError, "model must return a tensor"),
        (lambda x, t: x.add_(1), ValueError, "changed its input x in place"),
    ],
)
def test_models_that_return_something_else(model, error, message):
    with maker(model)().session(SHAPE, max_batch=3) as session:
        handles = [session.submit(sample_id=i) for i in range(4)]
        for handle in handles:
            with pytest.raises(error, match=message):
                handle.result(SECONDS)


def test_a_model_that_writes_into_states_only_in_company():
    """What it has spoilt is not gone on from."""
    gate, session = gated(max_batch=3)
    gate.model = lambda x, t: exact(x.add_(1) if x.shape[0] > 1 else x, t)
    with session:
        handles = [session.submit(sample_id=0)]
        gate.reached()
        handles += [session.submit(sample_id=i, num_steps=2) for i in (1, 2, 3)]
        gate.open()
        assert is_right(handles[3])
        for handle in handles[:3]:
            with pytest.raises(ValueError, match="changed its input x in place"):
                handle.result(SECONDS)


def test_arguments_that_cannot_be_joined():
    """A length that torch.cat refuses is the samples' own trouble."""

    def model(x, t, c):
        return exact(x, t, c=c.to_dense())

    sparse = [torch.eye(2)[i : i + 1, :1].to_sparse() for i in range(2)]
    good = {"c": torch.ones(1, 1)}
    make = maker(model)
    with make().session(SHAPE, max_batch=4) as session:
        handles = [session.submit(model_kwargs={"c": c}) for c in [*sparse, *sparse]]
        handles.append(session.submit(model_kwargs=good))
        concurrent.futures.wait(handles, SECONDS)
        assert torch.equal(handles[4].result(0), alone(make, SHAPE, model_kwargs=good))
    assert all(handle.done() for handle in handles)


# Closing ---------------------------------------------------------------------------------------


def test_a_block_that_ends_waits():
    gate, session = gated(max_batch=2)
    with session:
        handles = [session.submit(sample_id=i) for i in range(5)]
        gate.open()
    assert all(handle.done() for handle in handles)
    assert all(map(is_right, handles))
    with pytest.raises(SessionClosed, match="the session is closed: it takes no more samples"):
        session.submit()
    session.close()
    session.close(cancel=True)
    assert all(map(is_right, handles))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_gives_up(error):
    gate, session = gated(num_steps=1, max_batch=1)
    handles = []

    def block():
        with session:
            handles.extend(session.submit(sample_id=i, num_steps=1 + i) for i in range(3))
            gate.reached()
            gate.let()
            assert is_right(handles[0])
            handles[1].add_done_callback(lambda _: gate.open())  # given up, still in its step
            raise error

    with pytest.raises(error):
        block()
    found = [handle.exception(SECONDS) for handle in handles[1:]]
    for each in found:
        assert isinstance(each, SessionClosed)
        assert str(each) == "the session was closed before the sample was finished"
    assert found[0] is not found[1]  # each raised with its own traceback
    assert is_right(handles[0])


def test_closed_from_a_callback():
    gate, session = gated(num_steps=2, max_batch=1)
    handles = [session.submit(sample_id=i, num_steps=2) for i in range(3)]
    handles[0].add_done_callback(lambda _: session.close())
    gate.open()
    assert all(map(is_right, handles))
    with pytest.raises(SessionClosed):
        session.submit()
    gate, session = gated(num_steps=2, max_batch=1)
    handles = [session.submit(sample_id=i, num_steps=2) for i in range(3)]
    handles[0].add_done_callback(lambda _: session.close(cancel=True))
    gate.open()
    assert is_right(handles[0])
    for handle in handles[1:]:
        assert isinstance(handle.exception(SECONDS), SessionClosed)


# Results and iteration -------------------------------------------------------------------------


def test_results_asked_for_twice():
    with MAKE().session(SHAPE, max_batch=2) as session:
        handle = session.submit(sample_id=2)
        found = handle.result(SECONDS)
        assert handle.result() is found
        assert handle.exception() is None
    assert handle.result(0) is found
    assert is_right(handle)


def test_timeouts():
    gate, session = gated(max_batch=1)
    with session:
        handles = [session.submit(sample_id=i) for i in range(2)]
        for handle in handles:
            with pytest.raises(concurrent.futures.TimeoutError):
                handle.result(timeout=0)
            with pytest.raises(concurrent.futures.TimeoutError):
                handle.exception(timeout=0.01)
        gate.open()
        assert list(session) == handles  # those that were not there in time were not taken


def test_a_timeout_of_the_model_is_its_result():
    def model(x, t):
        raise concurrent.futures.TimeoutError("slow")

    with maker(model)().session(SHAPE, max_batch=1) as session:
        handle = session.submit()
        with pytest.raises(concurrent.futures.TimeoutError, match="slow"):
            handle.result()
        assert list(session) == []


def test_futures_of_the_standard_library():
    gate, session = gated(max_batch=2)
    with session:
        handles = [session.submit(sample_id=i, num_steps=1 + i % 3) for i in range(7)]
        gate.reached()
        handles[6].cancel()
        gate.open()
        done, pending = concurrent.futures.wait(handles, SECONDS)
        assert (done, pending) == (set(handles), set())
        assert set(concurrent.futures.as_completed(handles, SECONDS)) == set(handles)
        handles = [session.submit(sample_id=i) for i in range(3)]
        assert all(is_right(each) for each in concurrent.futures.as_completed(handles, SECONDS))
        done, _ = concurrent.futures.wait(
            [session.submit(), session.submit(num_steps=1)],
            SECONDS,
            concurrent.futures.FIRST_COMPLETED,
        )
        assert len(done) >= 1


def test_iteration():
    gate, session = gated(max_batch=2)
    with session:
        assert list(session) == []
        handles = [session.submit(sample_id=i, num_steps=1 + i % 3) for i in range(9)]
        gate.reached()
        handles[7].cancel()
        gate.open()
        handles[4].result(SECONDS)
        finished = []
        for handle in session:
            assert handle.done()
            finished.append(handle.sample_id)
            if len(finished) == 2:  # more come while it goes on
                handles.append(session.submit(sample_id=9))
    assert sorted(finished) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert list(session) == []
    assert all(is_right(handle) for i, handle in enumerate(handles) if i != 7)


def test_iteration_gives_failures_and_ends():
    gate, session = gated(max_batch=1)
    gate.model = lambda x, t: None
    gate.open()
    with session:
        handles = [session.submit(sample_id=i) for i in range(3)]
        found = list(session)
        assert found == handles
        for handle in found:
            with pytest.raises(TypeError, match="NoneType"):
                handle.result()


def test_an_iterator_that_is_left_loses_nothing():
    with MAKE().session(SHAPE, max_batch=2) as session:
        handles = [session.submit(sample_id=i) for i in range(6)]
        for handle in session:
            first = handle
            break
        rest = list(session)
    assert {first, *rest} == set(handles)
    assert len(rest) == 5


def test_callbacks():
    """May submit, take results and iterate over what is there; may not wait for others."""
    gate, session = gated(num_steps=2, max_batch=1)
    said, later = [], []

    def then(handle):
        assert handle.result() is handle.result()
        later.append(session.submit(sample_id=8))
        for wait in (later[0].result, later[0].exception, lambda: list(session)):
            try:
                wait()
            except RuntimeError as error:
                said.append(str(error))
        with pytest.raises(concurrent.futures.TimeoutError):
            later[0].result(timeout=0)

    with session:
        first = session.submit(sample_id=0)
        gate.reached()
        first.add_done_callback(then)
        gate.open()
        assert is_right(first)
        wait_until_idle = list(session)
        assert later == wait_until_idle
        assert is_right(later[0])
    assert len(said) == 3
    assert all("cannot wait for another sample of the session" in each for each in said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_exits_ends_the_session_alone():
    """SystemExit is nothing that a thread can go on after; nobody waits for ever."""
    gate, session = gated(num_steps=1, max_batch=2)
    handles = [session.submit(sample_id=0, num_steps=2)]
    gate.reached()
    handles += [session.submit(sample_id=i) for i in (1, 2)]

    def leave(_):
        raise SystemExit(3)

    handles[0].add_done_callback(leave)
    thread = session._book.thread
    gate.open()
    thread.join(SECONDS)
    assert is_right(handles[0])
    assert is_right(handles[1])  # finished in the same step
    assert isinstance(handles[2].exception(SECONDS), SystemExit)
    with pytest.raises(SessionClosed):
        session.submit()
    session.close()


def test_how_it_is_shown():
    gate, session = gated()
    with session:
        handle = session.submit(seed=5, sample_id=6)
        gate.reached()
        gate.let()
        assert repr(handle) == "<Handle of seed 5, sample 6: 1 of 4 steps>"
        gate.open()
    assert repr(handle) == "<Handle of seed 5, sample 6: done>"
