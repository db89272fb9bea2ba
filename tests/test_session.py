"""Sessions: each sample is the one that is drawn alone, whatever its company."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from concurrent.futures import wait
from dataclasses import replace

import pytest
import torch
from session_cases import SECONDS, SHAPE, alone, drawn, exact, gated, maker
from test_unet_variants import SMALL, VARIANTS
from unet_weights import gap, randomised

from ddpm_fast import UNet, use_backend
from ddpm_fast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = (1, 8, 8)
SEEDS = [0, 7, 2**63 + 1, 2**64 - 1]
CLASSES = replace(SMALL, num_classes=3)


def unet(config=SMALL):
    torch.manual_seed(0)
    return randomised(UNet(config))


def label(i):
    return {"class_labels": torch.tensor([i % 3])}


def assert_as_alone(make, shape, asked, max_batch=5, exactly=True, within=1e-3):
    """Drawn in one session, and each alone."""
    with make().session(shape, max_batch=max_batch) as session:
        found = drawn(session, asked)
    for arguments, x in zip(asked, found, strict=True):
        expected = alone(make, shape, **arguments)
        assert x.shape == expected.shape
        assert not x.requires_grad
        assert not x.is_inference()
        if exactly:
            assert torch.equal(x, expected), arguments
        else:
            assert gap(x, expected) < within, arguments
    assert len({x.data_ptr() for x in found if x.numel()}) in (0, len(found))


# Many at random --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_a_thousand_arrivals_and_cancellations(max_batch):
    chance = random.Random(max_batch)
    make = maker(exact)
    handles, cancelled = [], set()
    with make().session(SHAPE, max_batch=max_batch, max_waiting=40) as session:
        for i in range(1000):
            steps = chance.choice([None, *range(1, 25)])  # more lengths than are kept
            handles.append(session.submit(seed=chance.choice(SEEDS), sample_id=i, num_steps=steps))
            if chance.random() < 0.2:
                unwanted = chance.choice(handles[-40:])
                if unwanted.cancel():
                    cancelled.add(unwanted)
                else:
                    assert unwanted.done()
            if session.waiting > 30 or chance.random() < 0.05:
                wait([chance.choice(handles[-40:])], timeout=SECONDS)
    assert len(cancelled) > 20
    assert cancelled == {handle for handle in handles if handle.cancelled()}
    kept = [handle for handle in handles if handle not in cancelled]
    finished = list(session)
    assert len(finished) == len(kept)
    assert set(finished) == set(kept)
    for steps in {handle.num_steps for handle in kept}:
        some = [handle for handle in kept if handle.num_steps == steps]
        expected = make(num_steps=steps).sample(
            [len(some), *SHAPE],
            seed=torch.tensor([h.seed - (h.seed >> 63 << 64) for h in some]),
            sample_ids=[h.sample_id for h in some],
        )
        assert torch.equal(torch.stack([h.result(0) for h in some]), expected)


def test_nothing_is_drawn_twice():
    """Each sample's steps are taken once, in their order."""
    chance, told = random.Random(0), {}

    def model(x, t, who):
        for who_, t_ in zip(who.tolist(), t.tolist(), strict=True):
            told.setdefault(who_, []).append(t_)
        return exact(x, t)

    make = maker(model)
    with make().session(SHAPE, max_batch=6) as session:
        lengths = [chance.randint(1, 30) for _ in range(120)]
        for i, length in enumerate(lengths):
            session.submit(sample_id=i, num_steps=length, model_kwargs={"who": torch.tensor([i])})
    tables = [make(num_steps=length).table.timesteps.tolist() for length in lengths]
    assert told == dict(enumerate(tables))


def test_first_come_first_served():
    gate, session = gated(max_batch=2)
    with session:
        handles = [session.submit(num_steps=2)]
        gate.reached()
        handles += [session.submit(num_steps=n) for n in [3, 1, 2, 1]]
        assert (session.running, session.waiting) == (1, 4)
        gate.open()
        order = [handles.index(handle) for handle in session]
    # In the batch: 0, 01, 12, 13, 34
    assert gate.sizes == [1, 2, 2, 2, 2]
    assert order == [0, 2, 1, 3, 4]
    assert [handle.step for handle in handles] == [2, 3, 1, 2, 1]


# Models and methods ----------------------------------------------------------------------------

PLANS = {
    "plain": (SMALL, {}),
    "timesteps": (SMALL, {"timesteps": [900, 500, 120, 7, 0]}),
    "trailing": (SMALL, {"spacing": "trailing"}),
    "ddim": (SMALL, {"method": "ddim", "eta": 0.5}),
    "the model's eps": (SMALL, {"method": "ddim", "eps_source": "model"}),
    "learned": (replace(SMALL, out_channels=2), {"variance": "learned_range"}),
    "large": (SMALL, {"variance": "fixed_large", "prediction": "v_prediction", "clip": None}),
    "floats": (SMALL, {"model_timesteps": torch.arange(1000) / 10 + 0.05}),
    "threshold": (SMALL, {"dynamic_threshold": 0.9}),
    "denoised": (SMALL, {"denoised_fn": lambda x0: x0 * 0.5, "dynamic_threshold": 0.5}),
    "symmetric": (VARIANTS["symmetric"], {}),
}


@pytest.mark.parametrize("name", PLANS)
def test_of_a_plan(name):
    """The native executor's samples have the bits that they have alone."""
    config, arguments = PLANS[name]
    asked = [
        {"seed": SEEDS[i % 4], "sample_id": i, "num_steps": [None, 3, 8, 1][i % 4]}
        for i in range(11)
    ]
    assert_as_alone(maker(unet(config), **arguments), IMAGE, asked, exactly=native is not None)


@pytest.mark.parametrize("config", [CLASSES, VARIANTS["guided"]], ids=["classes", "scaled"])
def test_of_a_plan_with_classes(config):
    asked = [
        {"seed": 3, "sample_id": i, "num_steps": 4 + i % 3, "model_kwargs": label(i)}
        for i in range(9)
    ]
    if config is CLASSES:
        asked += [{"seed": 4}, {"seed": 5, "model_kwargs": {"class_labels": None}}]
    assert_as_alone(maker(unet(config)), IMAGE, asked, exactly=native is not None)


def test_of_diffusers():
    pytest.importorskip("diffusers")
    from unet2d_models import SMALL as THEIRS
    from unet2d_models import theirs_of

    asked = [
        {"sample_id": i, "num_steps": 2 + i % 3, "model_kwargs": {"return_dict": i % 2 == 0}}
        for i in range(5)
    ]
    assert_as_alone(maker(theirs_of(THEIRS)), [3, 8, 8], asked, exactly=native is not None)
    make = maker(theirs_of(THEIRS), plan="off")
    assert_as_alone(make, [3, 8, 8], asked, exactly=False)


def test_guided_and_unguided():
    """By the sampler, or by submit: samples of other scales share a batch."""
    make = maker(unet(CLASSES))
    asked = [
        {"seed": 1, "model_kwargs": label(0)},
        *(
            {
                "seed": 2,
                "sample_id": i,
                "num_steps": 3 + i,
                "model_kwargs": label(i),
                "uncond_kwargs": {},
                "guidance_scale": scale,
            }
            for i, scale in enumerate([0.0, 1, 1.7, 4.5, -0.3])
        ),
        {"seed": 2, "uncond_kwargs": label(1), "guidance_scale": 2.0},
    ]
    assert_as_alone(make, IMAGE, asked, exactly=native is not None)
    make = maker(unet(CLASSES), guidance_scale=2.5, dynamic_threshold=0.8)
    asked = [
        {"model_kwargs": label(0), "uncond_kwargs": {}},
        {"model_kwargs": label(1), "uncond_kwargs": {}, "guidance_scale": 3.25},
        {"model_kwargs": label(2), "uncond_kwargs": {}, "guidance_scale": 0},
    ]
    assert_as_alone(make, IMAGE, asked, exactly=native is not None)


class Subclass(UNet):
    pass


OTHERS = {
    "off": (UNet, {"plan": "off"}),
    "names": (UNet, {"plan": ["time_table"]}),
    "subclass": (Subclass, {}),
    "reference": (UNet, {"backend": "reference"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_other_arithmetic(name):
    """Whose rounding depends on the batch."""
    kind, arguments = OTHERS[name]
    asked = [{"seed": 9, "sample_id": i, "num_steps": [None, 3][i % 2]} for i in range(6)]
    make = maker(randomised(kind(SMALL)), method="ddim", **arguments)
    assert_as_alone(make, IMAGE, asked, exactly=False)


@pytest.mark.parametrize(
    "arguments", [{}, {"plan": "off"}, {"plan_dtype": torch.bfloat16}], ids=str
)
def test_in_fewer_bits(arguments):
    """As near to float32 as what is drawn alone."""
    asked = [{"sample_id": i, "num_steps": [None, 3][i % 2]} for i in range(6)]
    model = unet().bfloat16().float()
    exactly = [alone(maker(model, method="ddim"), IMAGE, **each) for each in asked]
    if "plan_dtype" not in arguments:
        model = copy.deepcopy(model).bfloat16()
    make = maker(model, method="ddim", **arguments)
    with make().session(IMAGE, max_batch=4) as session:
        found = drawn(session, asked)
    apart = [alone(make, IMAGE, **each) for each in asked]
    assert 0 < error(found, exactly) <= 2 * error(apart, exactly)


def error(found, expected):
    return (torch.stack(found) - torch.stack(expected)).square().mean().sqrt().item()


def test_what_the_caller_has_set_counts():
    model = unet()
    seen = []

    def told(x, t):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_device().type))
        assert not torch.is_grad_enabled()
        return model(x, t)

    make, asked = maker(told), [{"sample_id": i} for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_alone(make, IMAGE, asked, exactly=False, within=0.5)
    assert {autocast for autocast, _ in seen} == {True}
    del seen[:]
    with torch.device("meta"):
        session = make().session(IMAGE, max_batch=2)
        handle = session.submit()
    assert handle.result(SECONDS).device.type == "cpu"
    assert set(seen) == {(False, "meta")}
    with use_backend("reference"):
        assert_as_alone(maker(model), IMAGE, asked, exactly=False)
    with torch.inference_mode():
        session = maker(exact)().session(SHAPE, max_batch=2)
        handles = [session.submit(sample_id=i) for i in range(3)]
    for i, handle in enumerate(handles):
        assert torch.equal(handle.result(SECONDS), alone(maker(exact), SHAPE, sample_id=i))


@pytest.mark.parametrize(
    "shape", [[5], [3, 1], (1, 7, 5), [2, 3, 2, 2], torch.Size([0, 4])], ids=str
)
def test_shapes(shape):
    asked = [{"sample_id": i, "num_steps": 2 + i} for i in range(5)]
    assert_as_alone(maker(exact), shape, asked, max_batch=3)


# Changes ---------------------------------------------------------------------------------------


def test_rounded_weights_that_change_while_nothing_is_drawn():
    """Which autocast would keep as long as a thread is under it, but for the inference mode."""
    model = unet().requires_grad_()
    make = maker(lambda x, t: model(x, t))
    with torch.autocast("cpu", torch.bfloat16), make().session(IMAGE, max_batch=1) as session:
        assert torch.equal(drawn(session, [{}])[0], alone(make, IMAGE))
        with torch.no_grad():
            model.conv_out.weight.mul_(1.5)
        found = drawn(session, [{}])[0]
        torch.clear_autocast_cache()
        assert torch.equal(found, alone(make, IMAGE))


@pytest.mark.parametrize("plan", ["auto", "off"])
def test_weights_that_change_while_nothing_is_drawn(plan):
    model = unet()
    make = maker(model, plan=plan)
    with make().session(IMAGE, max_batch=3) as session:
        before = drawn(session, [{}, {"num_steps": 3}])
        with torch.no_grad():
            model.conv_out.weight.mul_(1.5)
        for steps, old in zip([None, 3], before, strict=True):
            (found,) = drawn(session, [{"num_steps": steps}])
            assert gap(found, old) > 1e-2
            assert gap(found, alone(make, IMAGE, num_steps=steps)) < 1e-3
        model.bfloat16()
        (found,) = drawn(session, [{}])
        assert gap(found, alone(make, IMAGE)) < 0.5


def test_a_model_that_becomes_unfit_costs_its_samples_alone():
    model = unet()
    make = maker(model, plan="all")
    with make().session(IMAGE, max_batch=2) as session:
        expected = drawn(session, [{}])
        hook = model.conv_in.register_forward_hook(lambda *_: None)
        for handle in [session.submit(), session.submit(num_steps=3)]:
            with pytest.raises(ValueError, match=r"forward hook .* on conv_in"):
                handle.result(SECONDS)
        hook.remove()
        assert torch.equal(drawn(session, [{}])[0], expected[0])


def test_the_sampler_as_it_was():
    make = maker(exact, guidance_scale=torch.tensor(2.0))
    sampler = make()
    asked = {"model_kwargs": {"a": torch.ones(1)}, "uncond_kwargs": {"a": torch.zeros(1)}}
    expected = alone(make, SHAPE, **asked)
    with sampler.session(SHAPE, max_batch=2) as session:
        sampler.guidance_scale.fill_(9.0)
        sampler.guidance_scale, sampler.clip, sampler.table = None, None, make(num_steps=2).table
        sampler.model, sampler.denoised_fn = None, torch.zeros_like
        sampler.model_timesteps = torch.zeros(1000)
        assert torch.equal(drawn(session, [asked])[0], expected)


def test_what_was_asked_may_be_changed_afterwards():
    gate, session = gated(max_batch=1)
    gate.model = lambda x, t, c=None: exact(x, t, **(c or {}))
    containers = {"c": {"a": torch.full((1,), 2.0)}}
    with session:
        first = session.submit()
        second = session.submit(model_kwargs=containers)
        containers["c"]["a"] = torch.full((1,), 3.0)
        containers["d"] = 1
        gate.open()
    assert torch.equal(first.result(0), alone(maker(exact, num_steps=4), SHAPE))
    expected = alone(maker(exact, num_steps=4), SHAPE, model_kwargs={"a": torch.full((1,), 2.0)})
    assert torch.equal(second.result(0), expected)


def test_results_keep_no_plan_alive():
    sampler = maker(unet())()
    session = sampler.session(IMAGE, max_batch=2)
    with session:
        handles = [session.submit(sample_id=i, num_steps=2 + i) for i in range(3)]
        thread = session._book.thread
        handles[2].result(SECONDS)
    assert len(list(session)) == 2
    results = [handle.result() for handle in handles]
    thread.join(SECONDS)
    plan = weakref.ref(sampler._planner._made)
    assert plan() is not None
    del session, sampler
    gc.collect()
    assert plan() is None
    assert [handle.result() is x for handle, x in zip(handles, results, strict=True)] == [True] * 3


def test_many_lengths_at_once(monkeypatch):
    """More than are kept while others are in the batch."""
    monkeypatch.setattr("ddpm_fast.sessions.lanes._KEPT", 2)
    asked = [{"sample_id": i, "num_steps": 1 + (5 * i) % 23} for i in range(60)]
    make = maker(exact)
    sampler = make()
    with sampler.session(SHAPE, max_batch=4) as session:
        found = drawn(session, asked)
        assert len(session._flight.lanes.table) < sum(range(1, 24))
    for arguments, x in zip(asked, found, strict=True):
        assert torch.equal(x, alone(make, SHAPE, **arguments))


def test_rows_that_move_in_the_joined_table():
    """While samples of a call of their own are under way."""
    gate, session = gated(num_steps=4, max_batch=8)
    a = {"model_kwargs": {"a": torch.full((1,), 0.5)}}
    asked = [{"num_steps": 5}, a, {"num_steps": 7, **a}]
    with session:
        handles = [session.submit(**asked[0])]
        gate.reached()
        handles += [session.submit(**each) for each in asked[1:]]
        gate.open()
    for handle, arguments in zip(handles, asked, strict=True):
        expected = alone(maker(exact, num_steps=4), SHAPE, **arguments)
        assert torch.equal(handle.result(), expected)


def test_memory_of_results_is_their_own():
    with maker(exact)().session(SHAPE, max_batch=4) as session:
        found = drawn(session, [{"sample_id": i} for i in range(4)])
    for x in found:
        assert x.untyped_storage().nbytes() == x.nbytes
    expected = alone(maker(exact), SHAPE, sample_id=1)
    found[0].fill_(3.0)
    assert torch.equal(found[1], expected)
