"""A captured step is not met again when what it was made of has changed."""

from __future__ import annotations

import types
import weakref

import pytest
import torch
from graph_cases import (
    SHAPE,
    Net,
    assert_played,
    assert_same,
    drawn,
    graphs_on_host,  # noqa: F401
    model,
    sampler_of,
    silent,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_step_reads_is_kept(graphs):
    """A tensor that a function drops may not be given to somebody else."""
    held = types.SimpleNamespace(gain=torch.full((1,), 2.0))
    sampler = sampler_of(lambda x, t: held.gain * model(x, t))
    sampler.sample(SHAPE)
    storage = held.gain.untyped_storage()
    (step,) = sampler._graphs._kept.values()
    assert storage._cdata in next(kept for kept in step._keeps if isinstance(kept, dict))
    held.gain = torch.full((1,), 3.0)
    assert_played(sampler, graphs)


def replaced(net):
    net.gain = torch.nn.Parameter(torch.tensor([1.5]))


def through_data(net):
    net.gain.data = torch.tensor([1.5])


def half(net):
    net.half()


def attribute(net):
    net.scale = 0.5


def patched(net):
    net.forward = types.MethodType(lambda self, x, t: 2 * Net.forward(self, x, t), net)


@pytest.mark.parametrize("change", [replaced, through_data, half, attribute, patched])
def test_changed_models_are_captured_again(change, graphs):
    for of in (lambda net: net, lambda net: lambda x, t: net(x, t), lambda net: net.__call__):
        net = Net()
        sampler = sampler_of(of(net))
        before = assert_played(sampler, graphs)
        first = [weakref.ref(step) for step in sampler._graphs._kept.values()]
        change(net)
        # A function does not tell that its dtype has changed, and gets float32 as before
        assert not torch.equal(assert_played(sampler, graphs)[-1], before[-1])
        graphs.clear()
        assert not any(step() for step in first)


def test_what_changes_all_the_time_is_not_always_captured(graphs):
    held = types.SimpleNamespace(gain=1.0)
    sampler = sampler_of(lambda x, t: held.gain * model(x, t), num_steps=6)
    for i in range(12):
        held.gain = 1.0 + i
        found = silent(lambda: sampler.sample(SHAPE))
        assert torch.equal(found, sampler_of(sampler.model, num_steps=6, graph="off").sample(SHAPE))
    assert len(graphs) == 4


def test_weights_that_are_written_to_are_read(graphs):
    net = Net()
    sampler = sampler_of(net)
    before = assert_played(sampler, graphs)
    for change in (lambda: net.gain.mul_(1.5), lambda: net.shift.data.fill_(0.3)):
        with torch.no_grad():
            change()
        found = assert_played(sampler, graphs, captures=0)
        assert not torch.equal(found[-1], before[-1])
        before = found


def test_changed_samplers_are_captured_again(graphs):
    sampler = sampler_of(method="ddim")
    for name, value in (
        ("clip", (-0.5, 0.5)),
        ("clip", None),
        ("denoised_fn", torch.tanh),
        ("clip", (-1.0, 1.0)),
        ("dynamic_threshold", 0.7),
        ("backend", "reference"),
        ("model", Net()),
        ("model", Net(torch.bfloat16)),
        ("model_timesteps", torch.arange(1000) / 3),
        ("table", sampler_of(num_steps=25).table),
    ):
        setattr(sampler, name, value)
        assert_played(sampler, graphs)
    sampler.clip = (-1, 1)  # equal
    assert_played(sampler, graphs, captures=0)
    sampler.graph = "off"
    before = sum(each.replays for each in graphs)
    drawn(sampler)
    assert sum(each.replays for each in graphs) == before
    assert len(sampler._graphs._kept) <= 4


def test_modes_are_captured(graphs):
    sampler = sampler_of(torch.nn.Conv2d(3, 3, 3, padding=1).eval())
    sampler.model = lambda x, t, conv=sampler.model: conv(x)
    assert_played(sampler, graphs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_played(sampler, graphs)
        steps = sampler.stream(SHAPE, seed=7)
        mixed = [next(steps).x for _ in range(5)]
    mixed += [step.x for step in steps]
    sampler.graph = "off"
    with torch.autocast("cpu", torch.bfloat16):
        steps = sampler.stream(SHAPE, seed=7)
        expected = [next(steps).x for _ in range(5)]
    assert_same(mixed, expected + [step.x for step in steps])


@pytest.mark.parametrize("from_step", [0, 1, 5, 18])
def test_models_that_a_callback_changes(from_step, graphs):
    """To the loop's bits where they change from the first step on; never in silence."""

    def found(how):
        held = types.SimpleNamespace(gain=1.0)
        sampler = sampler_of(lambda x, t: held.gain * model(x, t), graph=how)

        def callback(step):
            if step.step >= from_step:
                held.gain = 1.0 + step.step

        return sampler.sample(SHAPE, callback=callback)

    expected = found("off")
    if from_step < 2:
        assert torch.equal(silent(lambda: found("auto")), expected)
        return
    if from_step == 18:  # seen at the last step, which is next
        with pytest.warns(UserWarning, match="has changed while a trajectory was under way"):
            assert torch.equal(found("auto"), expected)
        return
    with pytest.warns(UserWarning, match="steps before step 8 may have been taken") as seen:
        found("auto")
    assert seen[0].filename == __file__
