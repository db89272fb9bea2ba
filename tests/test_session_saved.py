"""What a session's saved state holds, whenever it is saved, and what becomes of it."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from session_cases import SCHEDULE, SECONDS, SHAPE, Gated, alone, exact, gated, maker, wait_for
from test_unet_variants import SMALL
from unet_weights import gap, randomised

from ddpm_fast import InUseError, Sampler, SessionClosed, UNet
from ddpm_fast.sessions import lanes, saved
from ddpm_fast.states import StateFolder

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact, num_steps=4)
IMAGE = (1, 8, 8)


def is_right(handle, make=MAKE, shape=SHAPE, **arguments):
    expected = alone(
        make, shape, sample_id=handle.sample_id, num_steps=handle.num_steps, **arguments
    )
    return torch.equal(handle.result(SECONDS), expected)


def restored(folder, **arguments):
    """Handles of a session that has finished them."""
    gate, session = gated(**arguments)
    gate.open()
    with session:
        return session.restore(folder)


def save_between_steps(session, gate, folder):
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(session.save, folder)
        wait_for(lambda: session._book.pauses)
        gate.let()
    saving.result(SECONDS)


def unet():
    torch.manual_seed(0)
    return randomised(UNet(SMALL)).eval()


# Arguments -------------------------------------------------------------------------------------


def nested(x, t, cond):
    return exact(x, t, a=cond["x"]["y"], b=cond["x.y"])


def test_tensors_whose_paths_are_spelt_alike(tmp_path):
    make = maker(nested)
    kwargs = {"cond": {"x": {"y": torch.tensor([0.75])}, "x.y": torch.tensor([0.5])}}
    expected = alone(make, SHAPE, model_kwargs=kwargs)
    with make().session(SHAPE, max_batch=1) as session:
        session.submit(num_steps=1000)
        session.submit(model_kwargs=kwargs)
        session.save(tmp_path)
        session.close(cancel=True)
    with make().session(SHAPE, max_batch=1) as session:
        handle = session.restore(tmp_path)[-1]
        assert torch.equal(handle.result(SECONDS), expected)


def test_what_samples_shared_they_share_again(tmp_path):
    def model(x, t, text, y):
        return exact(x, t, y=y) + text.mean()

    torch.manual_seed(0)
    text, own = torch.randn(7, 5), torch.tensor([0.5])
    calls = []
    for again in (False, True):
        gate = Gated(model)
        session = Sampler(gate, SCHEDULE, num_steps=3).session(SHAPE, max_batch=4)
        with session:
            if again:
                with session._worker.paused():
                    handles = session.restore(tmp_path)
            else:
                with session._worker.paused():
                    for i in range(4):
                        session.submit(sample_id=i, model_kwargs={"text": text, "y": own})
                    session.save(tmp_path)
            gate.open()
        calls.append(gate.sizes)
    assert calls == [[4, 4, 4]] * 2
    make = maker(model, num_steps=3)
    assert all(is_right(each, make, model_kwargs={"text": text, "y": own}) for each in handles)


def test_a_tensor_is_placed_once():
    tensors = saved._Placed({"0": torch.ones(2)})
    assert tensors.on("0", "meta") is tensors.on("0", "meta")


# When ------------------------------------------------------------------------------------------


def test_saved_by_the_callback_of_one_of_several_that_end(tmp_path):
    gate, session = gated(num_steps=2)
    with session:
        with session._worker.paused():
            handles = [session.submit(sample_id=i) for i in range(4)]
            session.submit(sample_id=4, num_steps=3)
            session.submit(sample_id=5)
        handles[0].add_done_callback(lambda _: session.save(tmp_path))
        gate.open()
    found = restored(tmp_path, num_steps=2)
    assert sorted(each.sample_id for each in found) == list(range(6))
    assert [each.sample_id for each in found[:4]] == [0, 1, 2, 3]
    assert all(map(is_right, found))


def test_a_save_in_a_callback_leaves_the_step_unended(tmp_path):
    """Another thread's save waits until all callbacks of the step have run."""
    gate, session = gated(num_steps=1, max_batch=2)
    order = []

    def first(_):
        session.save(tmp_path / "a")
        waiting.append(pool.submit(lambda: session.save(tmp_path / "b") or order.append("b")))
        wait_for(lambda: session._book.pauses)
        session.save(tmp_path / "a")
        order.append("first")

    waiting = []
    with ThreadPoolExecutor(1) as pool, session:
        with session._worker.paused():
            handles = [session.submit(sample_id=i) for i in range(2)]
        handles[0].add_done_callback(first)
        handles[1].add_done_callback(lambda _: order.append("second"))
        gate.open()
        handles[1].result(SECONDS)
    assert waiting[0].result(SECONDS) is None
    assert order == ["first", "second", "b"]


def test_what_iteration_gave_and_nobody_took(tmp_path):
    gate, session = gated(num_steps=1)
    gate.open()
    with session:
        for i in range(4):
            session.submit(sample_id=i)
        iterator = iter(session)
        kept, taken = next(iterator), next(iterator)
        taken.result()
        dropped = next(iterator).sample_id
        last = next(iterator)
        session.save(tmp_path)
    assert dropped == 2
    found = restored(tmp_path, num_steps=1)
    assert [each.sample_id for each in found] == [kept.sample_id, last.sample_id]
    assert all(map(is_right, found))


def test_an_interrupted_save_lets_the_session_go_on(tmp_path, monkeypatch):
    gate, session = gated()
    with session:
        handle = session.submit(sample_id=3)
        gate.reached()
        changed = session._book.changed
        wait = changed.wait

        def interrupted(timeout=None):
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return wait(timeout)

        with monkeypatch.context() as patched:
            patched.setattr(changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.save(tmp_path)
        gate.open()
        assert is_right(handle)


def test_a_folder_that_somebody_saves_in(tmp_path):
    with MAKE().session(SHAPE, max_batch=1) as session:
        session.submit()
        with StateFolder(tmp_path, "session"), pytest.raises(InUseError, match="in use by"):
            session.save(tmp_path)
        session.save(tmp_path)


# Weights ---------------------------------------------------------------------------------------


@pytest.fixture
def gate():
    """In the way of each step: x̂₀ passes it."""
    return Gated(lambda x, t: x)


def with_gate(gate, model, **arguments):
    def passes(x0):
        return gate(x0, torch.zeros(x0.shape[0]))

    return maker(model, denoised_fn=passes, **arguments)


def test_all_that_fly_together_have_the_weights_of_one_look(gate, tmp_path):
    model = unet()
    before = copy.deepcopy(model)
    make = with_gate(gate, model)
    with make().session(IMAGE, max_batch=4) as session:
        handles = [session.submit(sample_id=0)]
        gate.reached()
        with torch.no_grad():
            model.conv_out.weight.mul_(1.5)
        handles += [session.submit(sample_id=i, num_steps=i) for i in (2, 3)]
        gate.let()
        with pytest.raises(ValueError, match="weights were changed while samples of its plan"):
            save_between_steps(session, gate, tmp_path)  # nobody knows the old weights any more
        gate.open()
    old = with_gate(gate, before)
    assert all(is_right(each, old, IMAGE) for each in handles)
    with make().session(IMAGE, max_batch=4) as session:
        again = session.submit(sample_id=2, num_steps=2)
    assert gap(again.result(), handles[1].result()) > 1e-2


def test_weights_of_a_plan_are_read_once(tmp_path, monkeypatch, gate):
    described, read = lanes.described, []
    monkeypatch.setattr(lanes, "described", lambda sampler: read.append(0) or described(sampler))
    model = unet()
    make = with_gate(gate, model)
    with make().session(IMAGE, max_batch=2) as session:
        first = session.submit()
        gate.reached()
        for _ in range(3):
            save_between_steps(session, gate, tmp_path)
        assert len(read) == 1
        gate.open()
        first.result(SECONDS)
        with torch.no_grad():
            model.conv_out.weight.mul_(1.5)
        session.submit(sample_id=1).result(SECONDS)
        session.save(tmp_path)
        assert len(read) == 2
    with make().session(IMAGE, max_batch=2) as session:
        assert session.restore(tmp_path) == []
    other = with_gate(gate, unet())().session(IMAGE, max_batch=2)
    with other, pytest.raises(ValueError, match="the model's weights: "):
        other.restore(tmp_path)


def test_weights_without_a_plan_are_those_of_the_moment(tmp_path, gate):
    model = unet()
    with with_gate(gate, model, plan="off")().session(IMAGE, max_batch=2) as session:
        session.submit()
        gate.reached()
        save_between_steps(session, gate, tmp_path)
        with torch.no_grad():
            model.conv_out.weight.mul_(1.5)
        save_between_steps(session, gate, tmp_path)
        gate.open()
    with with_gate(gate, model, plan="off")().session(IMAGE, max_batch=2) as session:
        assert len(session.restore(tmp_path)) == 1
    before = with_gate(gate, unet(), plan="off")().session(IMAGE, max_batch=2)
    with before, pytest.raises(ValueError, match="the model's weights: "):
        before.restore(tmp_path)


# Ends while it is saved -------------------------------------------------------------------------


def test_a_sample_given_up_meanwhile_is_saved_with_its_arguments(tmp_path):
    gate, session = gated(max_batch=1)
    scale = {"scale": torch.tensor([3.0])}
    handles = [session.submit(sample_id=i, model_kwargs=scale) for i in range(3)]
    state_of = session._flight.state_of

    def given_up_first(flyer):
        handles[2].cancel()
        return state_of(flyer)

    session._flight.state_of = given_up_first
    gate.reached()
    save_between_steps(session, gate, tmp_path)
    gate.open()
    session.close()
    found = restored(tmp_path)
    assert [handle.sample_id for handle in found] == [0, 1, 2]
    assert all(is_right(handle, model_kwargs=scale) for handle in found)


def test_what_was_given_up_does_not_take_the_place_of_what_was_saved(tmp_path):
    gate, session = gated()
    session.submit(sample_id=5)
    gate.reached()
    save_between_steps(session, gate, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(session.close, cancel=True)
        wait_for(lambda: not session.running)
        gate.open()
    closing.result(SECONDS)
    with pytest.raises(SessionClosed, match="has given up samples"):
        session.save(tmp_path)
    assert [handle.sample_id for handle in restored(tmp_path)] == [5]


def test_no_bound_takes_what_is_restored(tmp_path):
    with MAKE().session(SHAPE, max_batch=2) as session:
        for handle in [session.submit(sample_id=i) for i in range(20)]:
            handle.add_done_callback(lambda _: None)
        wait_for(lambda: not session.running and not session.waiting)
        session.save(tmp_path)
    for _ in range(2):
        with MAKE().session(SHAPE, max_batch=2, max_waiting=2) as session:
            session.restore(tmp_path)
            gc.collect()
            session.save(tmp_path)
            found = list(session)
        assert [handle.sample_id for handle in found] == list(range(20))
        assert all(map(is_right, found))
