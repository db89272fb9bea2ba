"""Samples that land later than their last step, as on a GPU; here the device's events are told when
to have happened."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from session_cases import SECONDS, SHAPE, Gated, alone, exact, maker, over, wait_for

from ddpm_fast import Sampler
from ddpm_fast.sessions import SessionClosed, SessionFull
from ddpm_fast.sessions import flight as flights
from ddpm_fast.sessions.flight import Flyer

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=2)


class Device:
    """Of events that happen when they are let, or waited for."""

    def __init__(self) -> None:
        self.happens, self.waited = threading.Event(), []
        device = self

        class Event:
            def __init__(self, blocking=False):
                self.paces = blocking

            def record(self):
                pass

            def query(self):
                return device.happens.is_set()

            def synchronize(self):
                device.waited.append("pace" if self.paces else "land")
                if not self.paces:
                    assert device.happens.wait(SECONDS)

        self.cuda = SimpleNamespace(Event=Event)

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, pin_memory=False, **arguments):
        return torch.empty(*size, **arguments)


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(flights, "torch", found)
    return found


def session_of(sampler, **arguments):
    session = sampler.session(SHAPE, **arguments)
    session._flight._lands_late = True
    return session


def is_right(handle):
    expected = alone(MAKE, SHAPE, sample_id=handle.sample_id, num_steps=handle.num_steps)
    return torch.equal(handle.result(SECONDS), expected)


def gated_session(**arguments):
    gate = Gated()
    return gate, session_of(Sampler(gate, MAKE().schedule, num_steps=2), **arguments)


def waits_for_landing(device):
    wait_for(lambda: "land" in device.waited)
    device.waited.clear()


def test_steps_are_taken_meanwhile(device):
    gate, session = gated_session(max_batch=3)
    with session:
        handles = [session.submit(sample_id=0)]
        gate.reached()
        handles += [session.submit(sample_id=i, num_steps=n) for i, n in [(1, 1), (2, 9)]]
        gate.let(5)
        assert [handle.step for handle in handles] == [2, 1, 4]
        assert not any(handle.done() for handle in handles)
        assert session.running == 3
        assert "land" not in device.waited
        device.happens.set()
        gate.let()
        assert is_right(handles[0])
        assert is_right(handles[1])
        assert not handles[2].done()
        gate.open()
        assert is_right(handles[2])
    assert device.waited == ["pace"] * (len(gate.sizes) - flights._AHEAD)


def test_others_do_not_wait_for_what_lands(device):
    gate, session = gated_session(max_batch=1)
    with session:
        handles = [session.submit(sample_id=i) for i in range(3)]
        gate.reached()
        gate.let(5)
        assert [handle.step for handle in handles] == [2, 2, 1]
        assert "land" not in device.waited
        device.happens.set()
        gate.open()
        assert all(map(is_right, handles))


def test_cancelled_while_they_land(device):
    gate, session = gated_session(max_batch=2, max_waiting=1)
    with session:
        handles = [session.submit(sample_id=0)]
        gate.reached()
        handles.append(session.submit(sample_id=1))
        gate.open()
        waits_for_landing(device)  # of both, since nothing else flies
        assert session.running == 2
        assert handles[0].cancel()
        assert session.running == 1
        handles += [session.submit(sample_id=i) for i in (2, 3)]
        with pytest.raises(SessionFull):
            session.submit()
        device.happens.set()
        assert list(session) == handles[1:]
        assert all(map(is_right, handles[1:]))
    assert handles[0].cancelled()


def test_given_up_while_they_land(device):
    session = session_of(MAKE(), max_batch=2)
    handle = session.submit()
    waits_for_landing(device)
    closing = threading.Thread(target=session.close, kwargs={"cancel": True})
    closing.start()
    assert isinstance(handle.exception(SECONDS), SessionClosed)
    device.happens.set()
    closing.join(SECONDS)
    assert not closing.is_alive()


def test_the_end_of_a_block_waits_for_what_lands(device):
    with session_of(MAKE(), max_batch=3) as session:
        handles = [session.submit(sample_id=i, num_steps=1 + i % 3) for i in range(8)]
        threading.Timer(0.05, device.happens.set).start()
    assert all(handle.done() for handle in handles)
    assert all(map(is_right, handles))


def test_nan_is_told_when_it_lands(device):
    """Nothing has looked at the states before."""

    def model(x, t, bad):
        return torch.where(over(bad > 0, x).bool(), torch.nan, exact(x, t))

    device.happens.set()
    flight = session_of(maker(model)(), max_batch=4)._flight
    flyers = [Flyer(0, i, 3, {"bad": torch.tensor([i % 2])}) for i in range(4)]
    assert flight.join(flyers) == []
    (group,) = flight._groups.values()
    group._find_nans = lambda failed: None  # as on a GPU
    landed = []
    while flight.busy:
        landed += flight.step()
    found = {each.flyer.sample_id: each.result for each in landed}
    for i in (1, 3):
        assert isinstance(found[i], FloatingPointError)
        assert str(found[i]).startswith("the state turned NaN: the output of the model")
    for i in (0, 2):
        kwargs = {"bad": torch.tensor([0])}
        expected = alone(maker(model), SHAPE, sample_id=i, num_steps=3, model_kwargs=kwargs)
        assert torch.equal(found[i], expected)


def test_settled_for_a_save(device):
    flight = session_of(MAKE(), max_batch=2)._flight
    flyers = [Flyer(0, i, 1 + i) for i in range(2)]
    flight.join(flyers)
    assert flight.step() == []
    threading.Timer(0.02, device.happens.set).start()
    (settled,) = flight.settle()
    assert settled.flyer is flyers[0]
    assert flight.settle() == []
    (landed,) = flight.step()
    assert landed.flyer is flyers[1]
    assert not flight.busy


def test_saves_wait_for_what_lands(device, tmp_path):
    """It is delivered by the session's own thread, as ever; several may save."""
    gate, session = gated_session(max_batch=2)
    threads, said = [], []

    def then(handle):
        threads.append(threading.current_thread())
        with pytest.raises(RuntimeError, match="cannot wait for another sample") as refused:
            other.result()
        said.append(refused)

    with session, ThreadPoolExecutor(2) as pool:
        handle = session.submit(sample_id=0, num_steps=1)
        gate.reached()
        handle.add_done_callback(then)
        other = session.submit(sample_id=1, num_steps=9)
        gate.let(3)
        saving = [pool.submit(session.save, tmp_path / str(i)) for i in range(2)]
        wait_for(lambda: len(session._book.pauses) == 2)
        threading.Timer(0.02, device.happens.set).start()
        gate.let()
        for each in saving:
            each.result(SECONDS)
        assert threads == [session._book.thread]
        assert len(said) == 1
        gate.open()
    for i in range(2):
        gate, session = gated_session(max_batch=2)
        gate.open()
        with session:
            handles = session.restore(tmp_path / str(i))
        assert [each.sample_id for each in handles] == [0, 1]
        assert len(gate.sizes) == 6  # three had been taken
        assert all(map(is_right, handles))


def test_saved_while_it_lands(device):
    """By a callback, which waits for nothing but the state."""

    def model(x, t, bad):
        return torch.where(over(bad > 0, x).bool(), torch.nan, exact(x, t))

    flight = session_of(maker(model)(), max_batch=2)._flight
    flyers = [Flyer(0, i, 1, {"bad": torch.tensor([i])}) for i in range(2)]
    flight.join(flyers)
    (group,) = flight._groups.values()
    group._find_nans = lambda failed: None  # as on a GPU
    flight.step(wait=False)
    assert flight.landing
    row, x = flight.state_of(flyers[0])
    kwargs = {"bad": torch.tensor([0])}
    assert row == 1
    assert torch.equal(x, alone(maker(model), SHAPE, num_steps=1, model_kwargs=kwargs))
    assert flight.state_of(flyers[1]) == (0, None)
