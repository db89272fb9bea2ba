"""The Sampler and the plan of its model."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from test_unet_variants import SMALL, VARIANTS
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import gap, randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, prepare
from ddpm_fast.backends import native
from ddpm_fast.nn import prepared

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 1, 8, 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(UNet(SMALL))


@pytest.fixture
def calls(monkeypatch):
    """How often a UNet itself is called."""
    seen = []
    forward = UNet.forward

    def counted(self, *arguments, **kwargs):
        seen.append(arguments)
        return forward(self, *arguments, **kwargs)

    monkeypatch.setattr(UNet, "forward", counted)
    return seen


def sampled(model, shape=SHAPE, **arguments):
    given = {name: arguments.pop(name, None) for name in ("model_kwargs", "uncond_kwargs")}
    return Sampler(model, SCHEDULE, **{"num_steps": 5, **arguments}).sample(shape, seed=3, **given)


def test_the_plan_takes_the_model_s_place(model, calls):
    found = sampled(model)
    assert not calls
    assert gap(found, sampled(model, plan="off")) < 1e-3
    assert len(calls) == 5
    for plan in (
        prepare(model),
        ["time_table"],
        "group_norm_silu",
        (),
        prepare(model, rewrites=()),
    ):
        assert gap(sampled(model, plan=plan), found) < 1e-3
    assert torch.equal(sampled(prepare(model)), found)
    assert len(calls) == 5


def test_states_of_a_stream_and_starts(model, calls):
    sampler = Sampler(model, SCHEDULE, num_steps=5)
    states = [step.x for step in sampler.stream(SHAPE, seed=3)]
    assert torch.equal(states[-1], sampler.sample(SHAPE, seed=3))
    assert torch.equal(states[-1], sampler.sample(SHAPE, seed=3, x_T=states[1], start=2))
    assert not calls
    assert not states[-1].is_inference()


def test_of_diffusers():
    pytest.importorskip("diffusers")
    theirs = theirs_of(THEIRS)
    shape = (2, 3, 8, 8)
    expected = sampled(theirs, shape, plan="off")
    theirs_called = []
    found = sampled(theirs, shape, model_kwargs={"return_dict": False})
    theirs.conv_in.register_forward_hook(lambda *_: theirs_called.append(1))
    assert gap(found, expected) < 1e-3
    with pytest.warns(UserWarning, match="sampling without a plan: .* forward hook"):
        assert torch.equal(sampled(theirs, shape), expected)
    assert len(theirs_called) == 5


def test_guidance_and_classes(calls):
    model = randomised(UNet(replace(SMALL, num_classes=3)))
    labels = torch.tensor([0, 2, 1])
    arguments = {"guidance_scale": 2.0, "model_kwargs": {"class_labels": labels}}
    for null in ({}, {"class_labels": None}, {"class_labels": torch.full((3,), 3)}):
        found = sampled(model, **arguments, uncond_kwargs=null)
        assert not calls
        assert gap(found, sampled(model, plan="off", **arguments, uncond_kwargs=null)) < 1e-3
        calls.clear()
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        sampled(model, model_kwargs={"labels": labels})
    with pytest.raises(ValueError, match="class_labels must lie in 0 … 3; got 0 … 4"):
        sampled(model, model_kwargs={"class_labels": torch.tensor([0, 4, 1])})


@pytest.mark.skipif(native is None, reason="installed without compiled kernels")
@pytest.mark.parametrize("name", ["ho", "guided", "classes"])
def test_samples_do_not_depend_on_the_batch(name):
    """With the native executor not by a bit, whatever the classes of the others."""
    config = replace(SMALL, num_classes=3) if name == "classes" else VARIANTS[name]
    sampler = Sampler(randomised(UNet(config)), SCHEDULE, num_steps=10)
    labels = None if config.num_classes is None else torch.arange(11) % 3

    def drawn(ids):
        kwargs = None if labels is None else {"class_labels": labels[list(ids)]}
        return sampler.sample([len(ids), 1, 8, 8], seed=3, sample_ids=ids, model_kwargs=kwargs)

    whole = drawn(range(11))
    for ids in ([5], [1, 4], [9, 2, 0], [3, 4, 5, 6, 7, 8, 9]):
        assert torch.equal(drawn(ids), whole[ids])


def test_learned_variances_and_told_timesteps(calls):
    model = randomised(UNet(replace(SMALL, out_channels=2)))
    told = torch.arange(1000) / 10 + 0.05
    arguments = {"variance": "learned_range", "model_timesteps": told}
    found = sampled(model, **arguments)
    assert not calls
    assert gap(found, sampled(model, plan="off", **arguments)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_fewer_bits(model, dtype, calls):
    exact = sampled(model, method="ddim")
    found = sampled(model, plan_dtype=dtype, method="ddim")
    assert found.dtype == torch.float32
    assert 0 < gap(found, exact) < 0.5
    half = copy.deepcopy(model).to(dtype)
    assert torch.equal(sampled(half, method="ddim"), sampled(prepare(half), method="ddim"))
    assert not calls


def test_refused_models_are_called_with_one_warning(model, calls):
    expected = sampled(model, plan="off")
    model.conv_in.register_forward_hook(lambda *_: None)
    calls.clear()
    sampler = Sampler(model, SCHEDULE, num_steps=5)
    with pytest.warns(UserWarning, match=r"without a plan: .*hook .* on conv_in") as seen:
        found = sampler.sample(SHAPE, seed=3)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.sample(SHAPE, seed=3), found)
        list(sampler.stream(SHAPE))
    assert torch.equal(found, expected)
    assert len(calls) == 15
    for plan in (["time_table"], "all"):
        with pytest.raises(ValueError, match=r"forward hook .* on conv_in"):
            sampled(model, plan=plan)
    model.conv_in._forward_hooks.clear()
    sampler.sample(SHAPE)
    assert len(calls) == 15


def test_hooks_that_come_later(model):
    plan = prepare(model)
    sampler = Sampler(model, SCHEDULE, num_steps=5, plan=plan)
    sampler.sample(SHAPE)
    model.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"forward hook .* on conv_in"):
        sampler.sample(SHAPE)


def test_in_training_mode_there_is_one_warning(model, calls):
    model.train()
    with pytest.warns(UserWarning, match="training mode") as seen:
        sampled(model)
    assert len(seen) == 1
    assert len(calls) == 5
    with pytest.warns(UserWarning, match="training"), pytest.raises(ValueError, match="eval mode"):
        sampled(model, plan="all")


def test_other_callables_are_called_silently(model, calls, monkeypatch):
    class Another(UNet):
        pass

    subclass = Another(SMALL).eval()
    subclass.load_state_dict(model.state_dict())
    compiled = torch.compile(model)
    assert Sampler(compiled, SCHEDULE)._planner.trajectory(compiled, [5], SHAPE) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (subclass, lambda x, t: model(x, t)):
            sampled(other)
        assert len(calls) == 10
        with torch.autocast("cpu", torch.bfloat16):
            sampled(model)
        assert len(calls) == 15
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        model.compile()
        sampled(model)
    assert len(calls) == 20
    for other in (subclass, compiled, lambda x, t: x):
        with pytest.raises(TypeError, match="a plan is of a UNet or of diffusers' UNet2DModel"):
            Sampler(other, SCHEDULE, plan="all")
        with pytest.raises(ValueError, match="plan_dtype is of the plan that is made for a UNet"):
            Sampler(other, SCHEDULE, plan_dtype=torch.bfloat16)


def test_bad_choices(model):
    with pytest.raises(ValueError, match="rewrites must be among"):
        Sampler(model, SCHEDULE, plan="on")
    with pytest.raises(TypeError, match="rewrites must be names; got NoneType"):
        Sampler(model, SCHEDULE, plan=None)
    with pytest.raises(ValueError, match="prepared from another model"):
        Sampler(copy.deepcopy(model), SCHEDULE, plan=prepare(model))
    for plan in ("off", prepare(model)):
        with pytest.raises(ValueError, match="plan_dtype is of the plan that is made"):
            Sampler(model, SCHEDULE, plan=plan, plan_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a plan's dtype must be"):
        Sampler(model, SCHEDULE, plan_dtype=torch.float64)


def test_bad_shapes_are_told(model):
    for shape, message in (([1, 1, 8, 6], "multiples of 4"), ([1, 2, 8, 8], r"\[N, 1, H, W\]")):
        with pytest.raises(ValueError, match=message):
            sampled(model, shape)
        with pytest.raises(ValueError, match=message):
            sampled(model, shape, plan="off")
    with pytest.raises(ValueError, match="x is on meta, and the plan on cpu"):
        Sampler(model, SCHEDULE, num_steps=2).sample(SHAPE, x_T=torch.zeros(SHAPE, device="meta"))


def test_changed_weights_are_sampled(model, calls):
    sampler = Sampler(model, SCHEDULE, num_steps=5)
    before = sampler.sample(SHAPE, seed=3)
    with torch.no_grad():
        model.conv_out.weight.mul_(1.5)
    found = sampler.sample(SHAPE, seed=3)
    assert gap(found, before) > 1e-2
    assert gap(found, sampled(model, plan="off")) < 1e-3
    sampler.model = randomised(UNet(SMALL), seed=1)
    assert torch.equal(sampler.sample(SHAPE, seed=3), sampled(sampler.model))
    assert len(calls) == 5


def test_out_of_memory_leaves_the_model(model, monkeypatch, calls):
    tried = []

    def broken(*_):
        tried.append(1)
        raise MemoryError("no room")

    expected = sampled(model, plan="off")
    calls.clear()
    monkeypatch.setattr(prepared, "TimeRows", broken)
    sampler = Sampler(model, SCHEDULE, num_steps=5)
    with pytest.warns(UserWarning, match="without a plan: not enough memory .*: no room"):
        assert torch.equal(sampler.sample(SHAPE, seed=3), expected)
    assert torch.equal(sampler.sample(SHAPE, seed=3), expected)
    assert len(tried) == 1
    assert len(calls) == 10
    with pytest.raises(MemoryError, match="no room"):
        sampled(model, plan="all")


def test_copies_make_plans_of_their_own(model, calls):
    sampler = Sampler(model, SCHEDULE, num_steps=5)
    expected = sampler.sample(SHAPE, seed=3)
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(again.sample(SHAPE, seed=3), expected)
    assert not calls


def test_nothing_is_kept(model):
    sampler = Sampler(model, SCHEDULE, num_steps=2)
    sampler.sample(SHAPE)
    plan = weakref.ref(sampler._planner._made)
    assert plan() is not None
    del sampler
    gc.collect()
    assert plan() is None


def test_scaled_and_shifted_networks(calls):
    model = randomised(UNet(VARIANTS["guided"]))
    kwargs = {"model_kwargs": {"class_labels": torch.tensor([2, 0, 1])}}
    found = sampled(model, **kwargs)
    assert not calls
    assert gap(found, sampled(model, plan="off", **kwargs)) < 1e-3
    with pytest.raises(ValueError, match="no null class"):
        sampled(model)
