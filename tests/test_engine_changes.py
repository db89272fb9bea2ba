"""A plan after its model changed, went away, or did not fit into memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_unet_variants import SMALL
from torch import nn
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import gap, randomised

from ddpm_fast import UNet, prepare
from ddpm_fast.nn import prepared
from ddpm_fast.nn.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def ours():
    torch.manual_seed(0)
    return randomised(UNet(SMALL))


def theirs():
    pytest.importorskip("diffusers")
    return theirs_of(THEIRS)


@pytest.fixture(params=[ours, theirs])
def model(request):
    return request.param()


def images(model):
    return torch.randn(
        2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3)
    )


def check(plan, model):
    """The plan is of the weights as they are."""
    x = images(model)
    with torch.no_grad():
        expected = model(x, torch.tensor([5, 5]))
    expected = expected if isinstance(expected, torch.Tensor) else expected.sample
    assert gap(plan(x, 5), expected) < 1e-4
    assert not plan.stale
    assert gap(plan.trajectory([5]).step(0, x), expected) < 1e-4


def step_of_an_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def loaded(model):
    model.load_state_dict({k: 1.01 * v for k, v in model.state_dict().items()})


def assigned(model):
    state = {k: 1.01 * v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def other_parameter(model):
    model.conv_in.weight = nn.Parameter(2 * model.conv_in.weight.detach())


def other_module(model):
    model.conv_in = copy.deepcopy(model.conv_in)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)


def other_data(model):
    model.conv_in.weight.data = 2 * model.conv_in.weight.data


def layout(model):
    # Converted by nn.Module, since diffusers' own warns of a list of modules that is empty
    nn.Module.to(model, memory_format=torch.channels_last)


CHANGES = [
    step_of_an_optimizer, loaded, assigned, other_parameter, other_module, other_data, layout,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(model, change):
    plan = prepare(model)
    check(plan, model)
    before, trajectory = plan(images(model), 5), plan.trajectory([5])
    change(model)
    assert plan.stale
    check(plan, model)
    if change is not layout:
        assert gap(before, plan(images(model), 5)) > 1e-4
    if change in (assigned, other_parameter, other_module):  # a trajectory is of its time
        assert torch.equal(trajectory.step(0, images(model)), before)


def test_what_cannot_be_seen_is_told(model):
    plan = prepare(model)
    x, before = images(model), plan(images(model), 5)
    model.conv_out.bias.data.add_(1)
    assert not plan.stale
    plan.refresh()
    assert gap(plan(x, 5), before + 1) < 1e-5
    check(plan, model)


def test_another_dtype_is_noticed(model):
    plan = prepare(model)
    nn.Module.to(model, torch.bfloat16)
    assert plan.stale
    assert plan.dtype == torch.bfloat16
    assert plan(images(model), 5).dtype == torch.bfloat16
    kept = prepare(model, dtype=torch.float32)
    nn.Module.to(model, torch.float16)
    assert kept(images(model), 5).dtype == torch.float32


@pytest.mark.parametrize("make", [ours, theirs])
def test_a_plan_outlives_its_model(make):
    """It keeps neither the model alive, nor the weights that it has laid out anew."""
    model = make()
    plan, x = prepare(model), images(model)
    expected = plan(x, 5)
    gone, copied = weakref.ref(model), weakref.ref(model.conv_in.weight)
    del model
    gc.collect()
    assert gone() is None
    assert copied() is None
    assert torch.equal(plan(x, 5), expected)
    assert not plan.stale
    with pytest.raises(ReferenceError, match="prepared from is gone"):
        plan.refresh()


class Broken:
    """An executor that takes some memory, and then more than there is."""

    REWRITES = ()
    owns_buffers = False
    made: weakref.ref | None = None
    words = ""

    def __init__(self, *_):
        kept = torch.zeros(1000)
        Broken.made = weakref.ref(kept)
        self.kept = [kept]
        if self.words == "python":
            raise MemoryError
        if self.words:
            raise torch.OutOfMemoryError(self.words)
        self.kept.append(torch.empty(2**50))


@pytest.mark.parametrize("words", ["", "python", "CUDA out of memory. Tried to allocate 2.00 GiB"])
def test_out_of_memory(model, monkeypatch, words):
    plan, x = prepare(model), images(model)
    expected = plan(x, 5)
    monkeypatch.setattr(Broken, "words", words)
    for name in ("TorchPlan", "NativePlan"):
        monkeypatch.setattr(prepared, name, Broken)
    gc.disable()
    try:
        with pytest.raises(MemoryError, match="not enough memory for a plan of the model"):
            prepare(model)
        assert Broken.made() is None  # at once, not by a collector
    finally:
        gc.enable()
    with torch.no_grad():
        model(x, torch.tensor([5, 5]))
    with pytest.raises(MemoryError, match="not enough memory"):
        plan.refresh()
    with pytest.raises(MemoryError, match="not enough memory"):
        plan(x, 5)
    monkeypatch.undo()
    assert torch.equal(plan(x, 5), expected)


def test_other_errors_are_not_called_a_want_of_memory(model, monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(prepared, "TimeRows", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        prepare(model)


def test_a_snapshot_holds_nothing_once_it_forgot():
    model = ours()
    snapshot = Snapshot(model)
    kept = weakref.ref(model.conv_in)
    assert snapshot.is_of(model)
    snapshot.forget()
    del model
    gc.collect()
    assert kept() is None


def test_a_plan_is_not_pickled():
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(prepare(ours()))
