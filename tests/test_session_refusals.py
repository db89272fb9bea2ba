"""What a session refuses, where, and in which words."""

from __future__ import annotations

import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from session_cases import SCHEDULE, SECONDS, SHAPE, alone, exact, maker
from test_unet_variants import SMALL
from unet_weights import randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, prepare
from ddpm_fast.engine import mixed_step

pytestmark = pytest.mark.usefixtures("one_thread")
MAKE = maker(exact)
CASES = [
    ({"shape": 5}, TypeError, r"shape must be \[C, …\], of one sample; got 5"),
    ({"shape": "345"}, TypeError, r"shape must be \[C, …\], of one sample; got '345'"),
    ({"shape": [3, 4.0]}, TypeError, r"shape must be an integer; got 4.0 \(float\)"),
    ({"shape": [3, True]}, TypeError, "shape must be an integer; got True"),
    ({"shape": []}, ValueError, r"shape must be \[C, …\], of one sample; got \[\]"),
    ({"shape": [3, -1]}, ValueError, r"shape must be \[C, …\], of one sample; got \[3, -1\]"),
    ({"max_batch": 0}, ValueError, "max_batch must be at least 1; got 0"),
    ({"max_batch": -2}, ValueError, "max_batch must be at least 1; got -2"),
    ({"max_batch": 1.5}, TypeError, "max_batch must be an integer; got 1.5"),
    ({"max_batch": True}, TypeError, "max_batch must be an integer; got True"),
    ({"max_batch": None}, TypeError, "max_batch must be an integer; got None"),
    ({"max_waiting": -1}, ValueError, "max_waiting must be at least 0; got -1"),
    ({"max_waiting": "8"}, TypeError, "max_waiting must be an integer; got '8'"),
]
SUBMITTED = [
    ({"seed": -1}, ValueError, r"seed must lie in 0 … 2\^64 - 1; got -1"),
    ({"seed": 2**64}, ValueError, r"seed must lie in 0 … 2\^64 - 1"),
    ({"seed": 1.0}, TypeError, r"seed must be an integer; got 1.0 \(float\)"),
    ({"seed": True}, TypeError, "seed must be an integer; got True"),
    ({"seed": None}, TypeError, "seed must be an integer; got None"),
    ({"seed": torch.tensor([1, 2])}, TypeError, "seed must be an integer"),
    ({"sample_id": -1}, ValueError, "sample_id must lie in 0 … .*; got -1"),
    ({"sample_id": 2**63}, ValueError, "sample_id must lie in 0 … 9223372036854775807"),
    ({"sample_id": "0"}, TypeError, "sample_id must be an integer; got '0'"),
    ({"sample_id": [0]}, TypeError, r"sample_id must be an integer; got \[0\]"),
    ({"num_steps": 0}, ValueError, "num_steps must be at least 1; got 0"),
    ({"num_steps": -5}, ValueError, "num_steps must be at least 1; got -5"),
    ({"num_steps": 1001}, ValueError, "num_steps must be an integer in 1 … 1000; got 1001"),
    ({"num_steps": 2.0}, TypeError, "num_steps must be an integer; got 2.0"),
    ({"num_steps": True}, TypeError, "num_steps must be an integer; got True"),
    ({"model_kwargs": [1]}, TypeError, "model_kwargs must be a mapping; got list"),
    ({"model_kwargs": "c"}, TypeError, "model_kwargs must be a mapping; got str"),
    ({"model_kwargs": {1: 2}}, TypeError, r"model_kwargs must have names as keys; got \[1\]"),
    ({"uncond_kwargs": {}}, ValueError, "guidance_scale, of submit or of the Sampler, and uncond"),
    ({"guidance_scale": 2.0}, ValueError, "and uncond_kwargs, both or neither"),
    (
        {"guidance_scale": 2.0, "uncond_kwargs": 3},
        TypeError,
        "uncond_kwargs must be a mapping; got int",
    ),
    *(
        ({"guidance_scale": scale, "uncond_kwargs": {}}, error, message)
        for scale, error, message in [
            (float("nan"), ValueError, "guidance_scale must be finite; got nan"),
            (float("-inf"), ValueError, "guidance_scale must be finite; got -inf"),
            (10**400, ValueError, "guidance_scale must be finite; got inf"),
            ("2", TypeError, "guidance_scale must be a number; got '2'"),
            (True, TypeError, "guidance_scale must be a number; got True"),
            (torch.ones(1), TypeError, "guidance_scale must be a number; got tensor"),
        ]
    ),
    ({"steps": 5}, TypeError, "unexpected keyword argument 'steps'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES, ids=lambda each: str(each)[:40])
def test_of_a_session(arguments, error, message):
    given = {"shape": SHAPE, "max_batch": 2, **arguments}
    with pytest.raises(error, match=message):
        MAKE().session(given.pop("shape"), **given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"), SUBMITTED, ids=lambda each: str(each)[:40]
)
def test_of_a_sample(arguments, error, message):
    """At once, and without a trace."""
    with MAKE().session(SHAPE, max_batch=2) as session:
        with pytest.raises(error, match=message):
            session.submit(**arguments)
        assert (session.running, session.waiting) == (0, 0)
        assert session._book.thread is None
        assert torch.equal(session.submit().result(SECONDS), alone(MAKE, SHAPE))


def test_arguments_by_name_only():
    with MAKE().session(SHAPE, max_batch=2) as session, pytest.raises(TypeError):
        session.submit(3)
    with pytest.raises(TypeError):
        MAKE().session(SHAPE, 3)


def test_numbers_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    with MAKE().session(numpy.array(SHAPE), max_batch=numpy.int64(2)) as session:
        handle = session.submit(
            seed=numpy.uint64(2**64 - 1), sample_id=torch.tensor(3), num_steps=numpy.int32(2)
        )
    expected = alone(MAKE, SHAPE, seed=2**64 - 1, sample_id=3, num_steps=2)
    assert torch.equal(handle.result(), expected)


def test_guidance_of_the_sampler():
    with pytest.raises(ValueError, match=r"a number in a session, .*; got a tensor \[2\]"):
        maker(exact, guidance_scale=torch.ones(2))().session(SHAPE, max_batch=2)
    make = maker(exact, guidance_scale=2.0)
    with make().session(SHAPE, max_batch=2) as session, pytest.raises(ValueError, match="both or"):
        session.submit()


def test_models():
    torch.manual_seed(0)
    model = randomised(UNet(SMALL))
    with pytest.raises(TypeError, match="the model's parameters are float64"):
        Sampler(UNet(SMALL).eval().double(), SCHEDULE).session([1, 8, 8], max_batch=2)
    for shape, message in (([1, 8, 6], "multiples of 4"), ([2, 8, 8], r"\[N, 1, H, W\]")):
        with pytest.raises(ValueError, match=message):
            Sampler(model, SCHEDULE).session(shape, max_batch=2)
    model.train()
    with pytest.warns(UserWarning, match="the model is in training mode") as seen:
        session = Sampler(model, SCHEDULE, num_steps=1).session([1, 8, 8], max_batch=2)
    assert [each.filename for each in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.submit().result(SECONDS).shape == (1, 8, 8)
    session.close()
    model.eval()
    model.conv_in.register_forward_hook(lambda *_: None)
    sampler = Sampler(model, SCHEDULE, num_steps=2)
    with pytest.warns(UserWarning, match="sampling without a plan") as seen:
        session = sampler.session([1, 8, 8], max_batch=2)
    assert [each.filename for each in seen] == [__file__]
    with session, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.submit().result(SECONDS).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="forward hook"):
        Sampler(model, SCHEDULE, plan="all").session([1, 8, 8], max_batch=2)


@pytest.mark.parametrize("scale", [2, np.float32(2.0), np.int64(2), Fraction(2)], ids=repr)
def test_guidance_scales_of_all_kinds(scale):
    kwargs = {
        "model_kwargs": {"a": torch.tensor([0.5])},
        "uncond_kwargs": {"a": torch.tensor([0.25])},
    }
    expected = alone(MAKE, SHAPE, guidance_scale=2.0, **kwargs)
    with MAKE().session(SHAPE, max_batch=1) as session:
        handle = session.submit(guidance_scale=scale, **kwargs)
        assert torch.equal(handle.result(SECONDS), expected)


def test_a_trajectory_without_timesteps():
    torch.manual_seed(0)
    empty = prepare(randomised(UNet(SMALL))).trajectory([])
    for step in (lambda x: mixed_step([(empty, 0)], x), lambda x: empty.step(0, x)):
        with pytest.raises(IndexError, match="in a trajectory, and this one has no timesteps"):
            step(torch.zeros(1, 1, 8, 8))


def test_unknown_arguments_of_the_model():
    torch.manual_seed(0)
    make = maker(randomised(UNet(SMALL)))
    with make().session([1, 8, 8], max_batch=3) as session:
        handles = [session.submit(model_kwargs=kwargs) for kwargs in ({}, {"labels": 1}, {"x": 2})]
    assert torch.equal(handles[0].result(), alone(make, [1, 8, 8]))
    for handle in handles[1:]:
        with pytest.raises(TypeError, match="argument"):
            handle.result()


def test_classes_that_there_are_not():
    torch.manual_seed(0)
    make = maker(randomised(UNet(replace(SMALL, num_classes=3))))
    labels = [torch.tensor([0]), torch.tensor([7]), torch.tensor([2]), torch.tensor([1, 2])]
    with make().session([1, 8, 8], max_batch=4) as session:
        handles = [
            session.submit(sample_id=i, model_kwargs={"class_labels": label})
            for i, label in enumerate(labels)
        ]
    with pytest.raises(ValueError, match="class_labels must lie in 0 … 3; got 7"):
        handles[1].result()
    with pytest.raises(ValueError, match=r"class_labels must have shape \[1\]; got \[2\]"):
        handles[3].result()
    for i in (0, 2):
        expected = alone(make, [1, 8, 8], sample_id=i, model_kwargs={"class_labels": labels[i]})
        assert torch.equal(handles[i].result(), expected)


def test_a_model_that_moves_away():
    torch.manual_seed(0)
    model = randomised(UNet(SMALL))
    make = maker(model, plan="off")
    with make().session([1, 8, 8], max_batch=2) as session:
        before = session.submit().result(SECONDS)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.to("meta")
        with pytest.raises(ValueError, match="the model is on meta now, and its session on cpu"):
            session.submit().result(SECONDS)
        model.to_empty(device="cpu").load_state_dict(state)
        assert torch.equal(session.submit().result(SECONDS), before)


def test_a_schedule_without_room_for_steps():
    sampler = Sampler(exact, NoiseSchedule.linear(10), timesteps=[7, 2])
    with sampler.session(SHAPE, max_batch=1) as session:
        with pytest.raises(ValueError, match="num_steps must be an integer in 1 … 10; got 11"):
            session.submit(num_steps=11)
        handles = [session.submit(), session.submit(num_steps=10)]
    assert [handle.num_steps for handle in handles] == [2, 10]
