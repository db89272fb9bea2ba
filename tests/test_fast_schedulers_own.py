"""Methods of a user's own, in a subclass or an instance, that the rows would pass over."""

from __future__ import annotations

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import FAST, SHAPE, generator, output_of_model, pair  # noqa: E402

from ddpm_fast import accelerate, randn  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

X, M = randn(SHAPE, seed=1), output_of_model(0)


class OwnVariance(FAST[DDPMScheduler]):
    def _get_variance(self, *arguments, **more):
        return 4 * super()._get_variance(*arguments, **more)


class OwnDDIMVariance(FAST[DDIMScheduler]):
    def _get_variance(self, timestep, prev_timestep):
        return 4 * super()._get_variance(timestep, prev_timestep)


class OwnOrder(FAST[DDPMScheduler]):
    def previous_timestep(self, timestep):
        return max(timestep - 200, -1)


def halved_variance(scheduler):
    """The scheduler, with a variance of its own in place of its class's."""
    real = scheduler._get_variance
    scheduler._get_variance = lambda *arguments, **more: 0.5 * real(*arguments, **more)
    return scheduler


def other_order(scheduler):
    scheduler.previous_timestep = lambda timestep: max(int(timestep) - 200, -1)
    return scheduler


OWN = {
    "variance": lambda: OwnVariance(),
    "ddim variance": lambda: OwnDDIMVariance(),
    "order": lambda: OwnOrder(),
    "instance's variance": lambda: halved_variance(FAST[DDPMScheduler]()),
    "accelerated": lambda: accelerate(halved_variance(DDPMScheduler())),
    "accelerated order": lambda: accelerate(other_order(DDPMScheduler())),
    "ddim instance's": lambda: accelerate(halved_variance(DDIMScheduler())),
}


@pytest.mark.parametrize("case", OWN)
def test_methods_of_ones_own_are_asked_with_one_warning(case):
    fast = OWN[case]()
    name = "previous_timestep" if "order" in case else "_get_variance"
    fast.set_timesteps(10)
    more = {"eta": 0.5} if "ddim" in case else {}
    with pytest.warns(RuntimeWarning, match=f"it has a {name} of its own"):
        ours = fast.step(M, 500, X, generator=generator(), **more).prev_sample
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fast.step(M, 500, X, generator=generator(), **more).prev_sample
    theirs = fast.stock.step(fast, M, 500, X, generator=generator(), **more).prev_sample
    assert torch.equal(ours, theirs)
    assert torch.equal(again, theirs)
    plain = fast.stock()
    plain.set_timesteps(10)
    stock = plain.step(M, 500, X, generator=generator(), **more).prev_sample
    assert (stock - theirs).abs().max() > 1e-3


def test_a_method_given_to_an_instance_later_is_noticed():
    _, fast = pair(DDPMScheduler, 10)
    first = fast.step(M, 500, X, generator=generator()).prev_sample
    halved_variance(fast)
    with pytest.warns(RuntimeWarning, match="_get_variance of its own"):
        second = fast.step(M, 500, X, generator=generator()).prev_sample
    assert not torch.equal(first, second)
    del fast._get_variance
    assert torch.equal(fast.step(M, 500, X, generator=generator()).prev_sample, first)


def test_an_instances_own_threshold_is_asked():
    fast = FAST[DDPMScheduler](thresholding=True)
    fast._threshold_sample = lambda sample: sample.clamp(-0.25, 0.25)
    assert fast.step(M, 500, X).pred_original_sample.abs().max() == 0.25
