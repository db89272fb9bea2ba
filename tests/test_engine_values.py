"""Changes of a model that PyTorch does not count: values, addresses, options."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from test_unet_variants import SMALL
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import gap, randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, prepare
from ddpm_fast.nn import prepared
from ddpm_fast.nn.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 1, 8, 8)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(UNet(SMALL))


def expected_of(model):
    with torch.no_grad():
        return model(X, torch.tensor([5, 5]))


def test_a_trajectory_sees_what_was_written_through_data(model):
    plan = prepare(model)
    before, begun = plan(X, 5), plan.trajectory([5])
    model.conv_out.bias.data.add_(1)
    assert torch.equal(plan(X, 5), before)  # a plain call has no look at values
    assert gap(plan.trajectory([5]).step(0, X), before + 1) < 1e-5
    assert gap(plan(X, 5), expected_of(model)) < 1e-4
    assert torch.equal(begun.step(0, X), before)
    kept = plan._prepared
    plan.trajectory([5])
    assert plan._prepared is kept  # nothing has changed since


def test_weights_of_inference_mode_are_looked_at():
    """They count no versions."""
    with torch.inference_mode():
        model = randomised(UNet(SMALL))
        plan = prepare(model)
        before = plan(X, 5)
        model.conv_out.bias.add_(1)
        assert gap(plan.trajectory([5]).step(0, X), before + 1) < 1e-5


def test_averages_are_sampled(model):
    """Written and taken back through ``.data``, as diffusers' EMAModel does."""
    stored = [parameter.detach().clone() for parameter in model.parameters()]

    def write(factor):
        for parameter, values in zip(model.parameters(), stored, strict=True):
            parameter.data.copy_(factor * values)

    sampler = Sampler(model, SCHEDULE, num_steps=2)
    before = sampler.sample(SHAPE, seed=3)
    write(0.9)
    averaged = sampler.sample(SHAPE, seed=3)
    assert torch.equal(averaged, Sampler(model, SCHEDULE, num_steps=2).sample(SHAPE, seed=3))
    assert not torch.equal(averaged, before)
    write(1)
    assert torch.equal(sampler.sample(SHAPE, seed=3), before)


def gaps(tensor):
    return torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2].copy_(tensor)


def backwards(tensor):
    dims = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(dims).contiguous().permute(dims)


@pytest.mark.parametrize("layout", [torch.clone, gaps, backwards])
def test_values_of_every_tensor_are_looked_at(model, layout):
    for tensor in model.parameters():
        tensor.data = layout(tensor.data)
    model.register_buffer("counted", torch.arange(100))
    model.register_buffer("empty", torch.zeros(0))
    for name, tensor in [*list(model.named_parameters())[::3], *model.named_buffers()]:
        snapshot = Snapshot(model)
        assert snapshot.has_values(), name
        tensor.data.copy_(tensor + 1)
        assert snapshot.is_of(model), name
        assert snapshot.has_values() != bool(tensor.numel()), name


def test_most_of_a_tensor_need_not_change(model):
    """The first and the last eighth, of 9 elements or many."""
    for count in (9, 33, 62, 63, 1000):
        model.register_buffer("some", torch.zeros(count))
        for part in (slice(0, count // 8), slice(count - count // 8, count)):
            snapshot = Snapshot(model)
            model.some.data[part] += 1
            assert not snapshot.has_values(), (count, part)


def test_values_are_compared_by_their_bits(model):
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
        model.conv_in.bias.zero_()
    snapshot = Snapshot(model)
    assert snapshot.has_values()
    model.conv_in.bias.data.neg_()
    assert not snapshot.has_values()


def test_another_storage_at_the_same_address_is_noticed(model):
    """As when memory is freed and given to another tensor."""
    weight, memory = model.conv_in.weight, model.conv_in.weight.detach().numpy().copy()
    weight.data = torch.from_numpy(memory)
    plan, place = prepare(model), (weight.data_ptr(), weight._version)
    memory *= 2
    weight.data = torch.from_numpy(memory)
    assert (weight.data_ptr(), weight._version) == place
    assert plan.stale
    assert gap(plan(X, 5), expected_of(model)) < 1e-4


def test_a_snapshot_keeps_no_memory(model):
    weight = model.conv_in.weight
    snapshot = Snapshot(model)
    kept = torch.UntypedStorage._weak_ref(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert torch.UntypedStorage._expired(kept)
    torch.UntypedStorage._free_weak_ref(kept)
    assert not snapshot.is_of(model)


def test_options_of_diffusers_that_come_later():
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = theirs_of(THEIRS)
    plan, x = prepare(model), torch.randn(1, 3, 8, 8)
    expected = plan(x, 5)
    attention = next(module for module in model.modules() if "processor" in module.__dict__)
    attention.processor = AttnProcessor2_0()
    assert plan.stale
    assert torch.equal(plan(x, 5), expected)
    attention.processor = AttnProcessor()
    with pytest.raises(ValueError, match=r"processor of .* is 'AttnProcessor'"):
        plan(x, 5)
    attention.processor = AttnProcessor2_0()
    assert torch.equal(plan(x, 5), expected)
    model.up_blocks[0].b1 = 1.2
    with pytest.raises(ValueError, match=r"FreeU on up_blocks\.0"):
        plan(x, 5)


def test_a_model_that_is_gone_after_a_failure(monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    model = UNet(SMALL).eval()
    plan = prepare(model)
    monkeypatch.setattr(prepared, "TimeRows", broken)
    with pytest.raises(MemoryError, match="no room") as told:
        plan.refresh()
    del model, told
    gc.collect()
    for use in (lambda: plan(X, 5), lambda: plan.trajectory([5]), lambda: plan.dtype):
        with pytest.raises(ReferenceError, match="prepared from is gone"):
            use()


def test_rows_are_integers(model):
    trajectory = prepare(model).trajectory([5])
    for row in (0.0, "0", None):
        with pytest.raises(TypeError, match=r"row must be an integer, .* got"):
            trajectory.step(row, X)
    assert torch.equal(trajectory.step(np.int64(0), X), trajectory.step(0, X))


def test_copies_of_a_plan_are_refused_with_a_way_out(model):
    plan = prepare(model)
    for sampler in (Sampler(model, SCHEDULE, plan=plan), Sampler(plan, SCHEDULE)):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"neither copied nor pickled: .*plan\.rewrites"):
                copied(sampler)
    named = Sampler(model, SCHEDULE, num_steps=2, plan=plan.rewrites)
    again = copy.deepcopy(named).sample(SHAPE)
    assert torch.equal(again, named.sample(SHAPE))
