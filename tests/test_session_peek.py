"""Samples of a session seen while they are drawn."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
import torch
from session_cases import SCHEDULE, SECONDS, SHAPE, Gated, alone, exact, gated, maker, wait_for

from ddpm_fast import Sampler
from ddpm_fast.sessions import SessionClosed, peeks
from ddpm_fast.stepping import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


def learned(x, t, **kwargs):
    return torch.cat([exact(x, t, **kwargs), 0.1 * x], dim=1)


def steps_of(sampler, **arguments):
    """The steps of a sample drawn alone."""
    ids = [arguments.pop("sample_id", 0)]
    return list(sampler.stream([1, *SHAPE], sample_ids=ids, **arguments))


METHODS = {
    "ddpm": {},
    "ddim, not clipped": {"method": "ddim", "clip": None, "spacing": "trailing"},
    "learned": {"variance": "learned_range"},
    "thresholded": {"dynamic_threshold": 0.8},
    "denoised_fn": {"denoised_fn": lambda x0: 0.9 * x0},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_what_stream_yields(name):
    arguments = METHODS[name]
    gate = Gated(learned if name == "learned" else exact)
    sampler = Sampler(gate, SCHEDULE, num_steps=5, **arguments)
    with sampler.session(SHAPE, max_batch=3) as session:
        session.submit()
        gate.reached()  # the others join at its second step
        one = session.submit(seed=3, sample_id=4)
        two = session.submit(seed=3, sample_id=5, num_steps=4)
        shown = [[], []]
        for _ in range(5):
            # While a step is under way, a look is at the one after it
            shown[0].append(one.peek())
            shown[1].append(two.peek())
            if len(shown[0]) < 5:
                gate.let()
        gate.open()
    shown[1].pop()
    for sample_id, found in ((4, shown[0]), (5, shown[1])):
        number = len(found)
        expected = steps_of(
            Sampler(gate.model, SCHEDULE, num_steps=number, **arguments),
            seed=3,
            sample_id=sample_id,
        )
        for step, peek in zip(expected, found, strict=True):
            seen = peek.result(timeout=SECONDS)
            assert (seen.step, seen.t) == (step.step, step.t)
            assert seen.x.shape == seen.x0.shape == SHAPE
            torch.testing.assert_close(seen.x, step.x[0], rtol=0, atol=0)
            torch.testing.assert_close(seen.x0, step.x0[0], rtol=0, atol=0)


def test_guided():
    gate = Gated()
    sampler = Sampler(gate, SCHEDULE, num_steps=3, guidance_scale=2.5)
    asked = {"model_kwargs": {"by": torch.tensor([0.5])}, "uncond_kwargs": {}}
    with sampler.session(SHAPE, max_batch=2) as session:
        handle = session.submit(seed=1, **asked)
        gate.reached()
        peek = handle.peek()
        gate.open()
        seen = peek.result(timeout=SECONDS)
    step = steps_of(Sampler(exact, SCHEDULE, num_steps=3, guidance_scale=2.5), seed=1, **asked)[1]
    assert torch.equal(seen.x, step.x[0])
    assert torch.equal(seen.x0, step.x0[0])


def test_looking_changes_no_bit():
    chance = random.Random(0)
    make = maker(exact)
    with make().session(SHAPE, max_batch=7) as session:
        handles = [session.submit(sample_id=i, num_steps=2 + i % 9) for i in range(60)]
        peeks_of = []
        while not all(handle.done() for handle in handles):
            handle = chance.choice(handles)
            peeks_of.append((handle, handle.peek()))
    for i, handle in enumerate(handles):
        assert torch.equal(handle.result(), alone(make, SHAPE, sample_id=i, num_steps=2 + i % 9))
    assert len(peeks_of) > 20
    for handle, peek in peeks_of:
        seen = peek.result(timeout=0)
        assert 0 <= seen.step < handle.num_steps
        if seen.step == handle.num_steps - 1:
            assert torch.equal(seen.x, handle.result())


def test_who_does_not_look_pays_nothing(monkeypatch):
    looked = []
    call = Stepper.__call__

    def spy(self, *args, **kwargs):
        looked.append(kwargs["return_x0"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", spy)
    gate, session = gated(num_steps=4)
    with session:
        handle = session.submit()
        gate.reached()
        gate.let()
        peek = handle.peek()
        gate.let()  # the step under way had begun before
        gate.open()
    assert peek.done()
    assert sum(looked) == 1
    assert len(looked) == 4


def test_before_it_is_in_the_batch():
    gate, session = gated(num_steps=2, max_batch=1)
    with session:
        session.submit()
        gate.reached()
        second = session.submit(sample_id=1)
        peek = second.peek()
        gate.let()
        assert not peek.done()
        gate.open()
        assert peek.result(timeout=SECONDS).step == 0


def test_of_a_finished_sample_it_is_the_image():
    sampler = Sampler(exact, SCHEDULE, num_steps=3, method="ddim", spacing="trailing")
    with sampler.session(SHAPE, max_batch=2) as session:
        handle = session.submit()
        image = handle.result(timeout=SECONDS)
        seen = handle.peek().result(timeout=0)
    assert (seen.step, seen.t) == (2, int(sampler.table.timesteps[-1]))
    assert seen.t > 0
    assert torch.equal(seen.x, image)
    assert torch.equal(seen.x0, image)
    seen.x.zero_()
    assert torch.equal(handle.peek().result(timeout=0).x, image)


def test_of_a_restored_sample(tmp_path):
    make = maker(exact)
    with make().session(SHAPE, max_batch=2) as session:
        handle = session.submit(sample_id=8)
        wait([handle], timeout=SECONDS)
        session.save(tmp_path / "state")
    with make().session(SHAPE, max_batch=2) as session:
        (restored,) = session.restore(tmp_path / "state")
        seen = restored.peek().result(timeout=SECONDS)
    assert torch.equal(seen.x, alone(make, SHAPE, sample_id=8))


def test_of_a_cancelled_sample():
    gate, session = gated(max_batch=1)
    with session:
        running, waiting = session.submit(), session.submit(sample_id=1)
        gate.reached()
        looks = [running.peek(), running.peek(), waiting.peek()]
        assert running.cancel()
        assert waiting.cancel()
        for peek in looks:
            with pytest.raises(CancelledError):
                peek.result(timeout=SECONDS)
        assert waiting.peek().cancelled()
        gate.open()


@pytest.mark.parametrize("finished", [False, True])
def test_what_is_seen_is_the_callers_own(finished):
    gate, session = gated(num_steps=2)
    with session:
        handle = session.submit()
        gate.reached()
        if finished:
            gate.open()
            handle.result(timeout=SECONDS)
        looks = [handle.peek() for _ in range(3)]
        gate.open()
        seen = [look.result(timeout=SECONDS) for look in looks]
        kept = seen[2].x.clone(), seen[2].x0.clone()
        for step in seen[:2]:
            step.x.fill_(1)
            step.x0.fill_(2)
        assert (seen[0].x == 1).all()
        assert (seen[1].x == 1).all()
        assert torch.equal(seen[2].x, kept[0])
        assert torch.equal(seen[2].x0, kept[1])
        assert torch.equal(handle.result(timeout=SECONDS), alone(maker(exact, num_steps=2), SHAPE))


def test_a_cancelled_peek_is_forgotten():
    gate, session = gated(num_steps=2)
    with session:
        handle = session.submit()
        gave_up, kept = handle.peek(), handle.peek()
        assert gave_up.cancel()
        gate.open()
        assert kept.result(timeout=SECONDS).x.shape == SHAPE
        handle.result(timeout=SECONDS)


@pytest.mark.parametrize("why", ["raises", "nan"])
def test_of_a_sample_that_fails(why):
    def model(x, t, bad):
        if why == "raises" and bool(bad.any()):
            raise OSError("no such class")
        return torch.where(over(bad), torch.nan, exact(x, t))

    def over(bad):
        return bad.reshape(-1, 1, 1, 1)

    gate = Gated(model)
    with Sampler(gate, SCHEDULE, num_steps=3).session(SHAPE, max_batch=2) as session:
        good = session.submit(model_kwargs={"bad": torch.tensor([False])})
        gate.reached()
        bad = session.submit(sample_id=1, model_kwargs={"bad": torch.tensor([True])})
        looks = bad.peek(), good.peek()
        gate.open()
        expected = OSError if why == "raises" else FloatingPointError
        with pytest.raises(expected):
            looks[0].result(timeout=SECONDS)
        with pytest.raises(expected):
            bad.peek().result(timeout=SECONDS)
        assert looks[1].result(timeout=SECONDS).x.isfinite().all()
        assert good.result(timeout=SECONDS).isfinite().all()


def test_a_session_that_gives_up():
    gate, session = gated()
    handle = session.submit()
    gate.reached()
    peek = handle.peek()
    closer = threading.Thread(target=session.close, kwargs={"cancel": True})
    closer.start()
    with pytest.raises(SessionClosed):
        peek.result(timeout=SECONDS)
    gate.open()
    closer.join(SECONDS)


def test_no_memory_to_look_ends_the_look_alone(monkeypatch):
    class Unseen:
        def __getitem__(self, i):
            raise MemoryError("no room for a picture")

    look = peeks.look
    monkeypatch.setattr(
        peeks, "look", lambda some, watched, x, x0: look(some, watched, x, Unseen())
    )
    make = maker(exact)
    gate = Gated()
    with Sampler(gate, SCHEDULE, num_steps=6).session(SHAPE, max_batch=2) as session:
        handle = session.submit()
        peek = handle.peek()
        gate.open()
        with pytest.raises(MemoryError, match="picture"):
            peek.result(timeout=SECONDS)
        assert torch.equal(handle.result(timeout=SECONDS), alone(make, SHAPE))


def test_none_is_left_waiting():
    """Threads that look at all moments of samples that end in all ways."""
    sampler = Sampler(exact, SCHEDULE, num_steps=4)
    with sampler.session(SHAPE, max_batch=4, max_waiting=10**6) as session:
        handles = [session.submit(sample_id=i) for i in range(300)]

        def watch(number):
            chance, found = random.Random(number), []
            for handle in chance.sample(handles, 150):
                if chance.random() < 0.1:
                    handle.cancel()
                found += [handle.peek() for _ in range(chance.randrange(4))]
                if found and chance.random() < 0.1:
                    found.pop(chance.randrange(len(found))).cancel()
            return found

        with ThreadPoolExecutor(4) as pool:
            found = [peek for some in pool.map(watch, range(4)) for peek in some]
        wait(handles, timeout=SECONDS)
        wait_for(lambda: all(peek.done() for peek in found))
    assert len(found) > 500
    assert any(peek.cancelled() for peek in found)
    assert any(not peek.cancelled() for peek in found)
