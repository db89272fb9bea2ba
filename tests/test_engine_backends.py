"""The backend that a plan is prepared under, and computes with."""

from __future__ import annotations

import pytest
import torch
from test_unet_variants import SMALL
from unet_weights import gap, randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, prepare, use_backend
from ddpm_fast.backends import chosen, native
from ddpm_fast.nn.native_plan import NativePlan
from ddpm_fast.nn.torch_plan import TorchPlan

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(native is None, reason="installed without compiled kernels")
SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 1, 8, 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(UNet(SMALL))


@pytest.fixture
def ran(monkeypatch):
    """Which executors are called, under which backend."""
    seen = []
    for executor in (NativePlan, TorchPlan):

        def called(self, x, rows, call=executor.__call__):
            seen.append((type(self), chosen()))
            return call(self, x, rows)

        monkeypatch.setattr(executor, "__call__", called)
    return seen


def sampled(sampler):
    return sampler.sample(SHAPE, seed=3)


@compiled
def test_a_sampler_s_backend_is_its_plan_s(model, ran):
    expected = sampled(Sampler(model, SCHEDULE, num_steps=2))
    assert ran == [(NativePlan, "auto")] * 2
    ran.clear()
    sampler = Sampler(model, SCHEDULE, num_steps=2, backend="reference")
    assert gap(sampled(sampler), expected) < 1e-3
    assert ran == [(TorchPlan, "reference")] * 2
    ran.clear()
    with use_backend("reference"):
        sampled(Sampler(model, SCHEDULE, num_steps=2, backend="cpu"))
    assert ran == [(NativePlan, "cpu")] * 2


@compiled
def test_a_backend_around_a_sample_is_obeyed(model, ran):
    sampler = Sampler(model, SCHEDULE, num_steps=2)
    expected = sampled(sampler)
    with use_backend("reference"):
        assert gap(sampled(sampler), expected) < 1e-3
    made = sampler._planner._made
    assert torch.equal(sampled(sampler), expected)
    assert sampler._planner._made is not made
    assert ran == [
        pair
        for pair in ((NativePlan, "auto"), (TorchPlan, "reference"), (NativePlan, "auto"))
        for _ in range(2)
    ]


@compiled
def test_a_plan_by_hand_keeps_its_backend(model, ran):
    with use_backend("reference"):
        plan = prepare(model)
    sampled(Sampler(model, SCHEDULE, num_steps=1, plan=plan))
    with torch.no_grad():
        model.conv_in.weight.mul_(2)  # prepared again
    sampled(Sampler(model, SCHEDULE, num_steps=1, plan=plan))
    assert [kind for kind, _ in ran] == [TorchPlan] * 2


def test_a_model_is_called_under_it():
    seen = []

    def model(x, t):
        seen.append(chosen())
        return x

    sampled(Sampler(model, SCHEDULE, num_steps=1, backend="reference"))
    sampled(Sampler(model, SCHEDULE, num_steps=1))
    assert seen == ["reference", "auto"]
