"""A model's keyword arguments in a session: which samples share a call, and that each gets its
own."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from session_cases import SHAPE, Gated, alone, exact, maker, over

from ddpm_fast.sessions.conditioning import copied, joined, signature, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = torch.linspace(-1, 1, 31)  # more than a batch
Pair = namedtuple("Pair", "a b")


@dataclass
class Options:
    """Unhashable, as dataclasses are."""

    gain: float


OPTIONS = Options(0.5)
ARRAY = np.ones(3, dtype=np.float32)


def model(x, t, **kwargs):
    """Takes anything, exactly."""
    for leaf in leaves(kwargs, x.shape[0]):
        x = x * over(leaf, x) + 0.125 if isinstance(leaf, torch.Tensor) else x * leaf
    return exact(x, t)


def leaves(value, count):
    if isinstance(value, torch.Tensor):
        if value.ndim and value.shape[0] not in (1, count):
            value = value[:1] * value[-1:]  # shared
        assert value.ndim == 0 or value.shape[0] in (1, count)
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from leaves(each, count)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each, count)
    elif isinstance(value, Options):
        yield value.gain
    elif isinstance(value, np.ndarray):
        yield float(value.sum())
    elif isinstance(value, str):
        yield len(value)
    elif value is not None:
        yield value


def ones(*shape, of=1.0):
    return torch.full((1, *shape), of)


SHARING = {
    "none": [{}, {}, {}],
    "classes": [{"c": torch.tensor([i])} for i in (3, 0, 2)],
    "images": [{"c": ones(*SHAPE, of=i)} for i in (0.5, 2.0, 3.0)],
    "shared tensors": [{"c": SHARED, "d": ones(of=i)} for i in (1.0, 2.0)],
    "nested": [
        {"c": {"a": [ones(of=i), ones(2, of=0.5)], "b": (None, "mode", 3)}, "d": [SHARED]}
        for i in (1.0, 2.0, 3.0)
    ],
    "strings and numbers": [{"a": "ab", "b": 2.5, "c": True, "d": None}] * 2,
    "unhashable": [{"a": OPTIONS, "b": ARRAY, "c": ones(of=i)} for i in (1.0, 2.0)],
    "an object": [{"a": Pair(SHARED, "ab"), "b": OrderedDict(a=1)} for _ in "a"],
}
APART = {
    "names": [{"a": ones()}, {"b": ones()}, {}],
    "order": [{"a": ones(), "b": ones(of=2)}, {"b": ones(), "a": ones(of=2)}],
    "shapes": [{"a": ones()}, {"a": ones(2)}, {"a": ones(1)}],
    "dtypes": [{"a": ones()}, {"a": ones().double()}, {"a": ones().long()}],
    "tensors": [{"a": SHARED}, {"a": SHARED.clone()}, {"a": SHARED.clone() * 2}],
    "no dimension": [{"a": torch.tensor(2.0)}, {"a": torch.tensor(3.0)}],
    "strings": [{"a": "ab"}, {"a": "abc"}],
    "numbers": [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": 2}],
    "zeros": [{"a": 0.0}, {"a": -0.0}],
    "lists and tuples": [{"a": [1]}, {"a": (1,)}, {"a": 1}],
    "unhashable": [{"a": Options(0.5)}, {"a": Options(0.5)}],
    "null": [{"a": None}, {}],
}


def in_company(asked):
    """Of samples that all wait before the first step: what each is, and the sizes of the calls."""
    gate = Gated(model)
    with maker(gate, num_steps=2)().session(SHAPE, max_batch=16) as session:
        session.submit(num_steps=1, model_kwargs={"first": "of all"})
        gate.reached()
        handles = [session.submit(sample_id=i, model_kwargs=each) for i, each in enumerate(asked)]
        gate.open()
    return [handle.result(0) for handle in handles], gate.sizes[1:]


@pytest.mark.parametrize("name", SHARING)
def test_calls_that_are_shared(name):
    asked = SHARING[name]
    found, sizes = in_company(asked)
    assert sizes == [len(asked)] * 2
    for i, (kwargs, x) in enumerate(zip(asked, found, strict=True)):
        expected = alone(maker(model, num_steps=2), SHAPE, sample_id=i, model_kwargs=kwargs)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("name", APART)
def test_calls_of_their_own(name):
    asked = APART[name]
    found, sizes = in_company(asked * 2)
    count = 2 * len(asked)
    # The second of each shares the first's call
    assert sizes == [2] * count
    for i, (kwargs, x) in enumerate(zip(asked * 2, found, strict=True)):
        expected = alone(maker(model, num_steps=2), SHAPE, sample_id=i, model_kwargs=kwargs)
        assert torch.equal(x, expected)


def test_all_kinds_at_once():
    asked = [kwargs for many in (SHARING, APART) for each in many.values() for kwargs in each]
    make = maker(model)
    with make().session(SHAPE, max_batch=10) as session:
        handles = [
            session.submit(sample_id=i, num_steps=1 + i % 5, model_kwargs=kwargs)
            for i, kwargs in enumerate(asked)
        ]
    for handle, kwargs in zip(handles, asked, strict=True):
        of = {"sample_id": handle.sample_id, "num_steps": handle.num_steps}
        assert torch.equal(handle.result(0), alone(make, SHAPE, model_kwargs=kwargs, **of))


def test_guided_and_unguided_are_apart():
    gate = Gated(model)
    kwargs = {"a": ones(of=0.5)}
    guided = {"uncond_kwargs": {"a": ones(of=2.0)}, "guidance_scale": 1.5}
    with maker(gate, num_steps=1)().session(SHAPE, max_batch=8) as session:
        session.submit(model_kwargs={"first": "of all"})
        gate.reached()
        plain = [session.submit(sample_id=i, model_kwargs=kwargs) for i in range(3)]
        both = [session.submit(sample_id=i, model_kwargs=kwargs, **guided) for i in range(2)]
        gate.open()
    assert gate.sizes[1:] == [3, 2, 2]
    make = maker(model, num_steps=1)
    for i, handle in enumerate(plain):
        assert torch.equal(handle.result(), alone(make, SHAPE, sample_id=i, model_kwargs=kwargs))
    for i, handle in enumerate(both):
        expected = alone(make, SHAPE, sample_id=i, model_kwargs=kwargs, **guided)
        assert torch.equal(handle.result(), expected)


def test_a_model_of_one_buffer():
    """That it returns every time: guidance keeps the first output apart."""
    buffer = torch.empty(64, *SHAPE)

    def reused(x, t, a):
        out = buffer[: x.shape[0]]
        return out.copy_(exact(x, t, a=a))

    asked = [
        {
            "sample_id": i,
            "num_steps": 2 + i % 3,
            "model_kwargs": {"a": ones(of=0.5 + i)},
            "uncond_kwargs": {"a": ones(of=2.0)},
            "guidance_scale": 1.0 + i,
        }
        for i in range(7)
    ]
    make = maker(exact)
    with maker(reused)().session(SHAPE, max_batch=3) as session:
        handles = [session.submit(**each) for each in asked]
    for handle, each in zip(handles, asked, strict=True):
        assert torch.equal(handle.result(0), alone(make, SHAPE, **each))


def test_trees():
    tree = {"a": [ones(of=2.0), (SHARED, "x")], "b": None}
    again = copied(tree)
    assert signature(again) == signature(tree)
    tree["a"][1] = 3
    tree["c"] = 1
    assert again["a"][1][0] is SHARED
    assert "c" not in again
    assert [each is SHARED for each in tensors(again)] == [False, True]
    both = joined([again, {"a": [ones(of=5.0), (SHARED, "x")], "b": None}])
    assert torch.equal(both["a"][0], torch.tensor([2.0, 5.0]))
    assert both["a"][1] == (SHARED, "x")


def test_arguments_that_refuse_to_be_compared():
    class Odd:
        def __hash__(self):
            return 5

        def __eq__(self, other):
            raise OSError("never")

    make = maker(lambda x, t, **_: exact(x, t))
    odd = [{"a": Odd()} for _ in range(3)]
    with make().session(SHAPE, max_batch=4) as session:
        handles = [session.submit(sample_id=i, model_kwargs=each) for i, each in enumerate(odd)]
        handles.append(session.submit(sample_id=3))
    for i, handle in enumerate(handles):
        error = handle.exception()
        if i == 0 or error is None:  # the others have met it, or come when it was gone
            assert torch.equal(handle.result(), alone(make, SHAPE, sample_id=i))
        else:
            assert isinstance(error, OSError)
    assert handles[3].exception() is None


def test_trees_that_hold_themselves_are_refused_when_they_are_given():
    tree: dict = {}
    tree["a"] = [tree]
    with maker(exact)().session(SHAPE, max_batch=1) as session:
        with pytest.raises(ValueError, match=r"model_kwargs .* hold themselves"):
            session.submit(model_kwargs=tree)
        assert torch.equal(session.submit().result(), alone(maker(exact), SHAPE))
