"""Lists of timesteps set again and again, with a −1, walked in jumps; η that changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import (  # noqa: E402
    BOTH,
    FAST,
    SHAPE,
    check_step,
    check_trajectory,
    generator,
    output_of_model,
    pair,
)

from ddpm_fast import randn  # noqa: E402
from ddpm_fast.integrations.diffusers.plans import Plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

X, M = randn(SHAPE, seed=1), output_of_model(0)
WITH_MINUS_ONE = [61, 103, 121]  # of 1000, with trailing spacing


@pytest.fixture
def made(monkeypatch):
    """How many rows were made, at each time that some were."""
    found = []
    real = Plan._make

    def counted(self, key, t, following=None):
        found.append(len(t))
        return real(self, key, t, following)

    monkeypatch.setattr(Plan, "_make", counted)
    return found


@pytest.mark.parametrize("num_steps", [1, 2, 4, 30])
@pytest.mark.parametrize("stock", BOTH)
def test_rows_are_made_of_the_list_alone_and_once(stock, num_steps, made):
    theirs, ours = pair(stock)
    for run in range(3):
        for n in (num_steps, 7):  # two lists, in turn
            for scheduler in (theirs, ours):
                scheduler.set_timesteps(n)
            check_trajectory(theirs, ours)
        if not run:
            first = list(made)
    assert max(first) == max(num_steps, 7)
    # DDIM's η has one row alone when it is first met; few steps are all taken with that.
    assert len(made) <= len(first) + (stock is DDIMScheduler and num_steps == 1)


@pytest.mark.parametrize("stock", BOTH)
def test_a_plan_that_was_kept_does_not_hide_a_change(stock):
    theirs, ours = pair(stock, 10)
    check_trajectory(theirs, ours)
    for change in (
        lambda s: s.alphas_cumprod.mul_(0.9),
        lambda s: s.register_to_config(prediction_type="sample"),
        lambda s: s.set_timesteps(12),  # every twelfth of 1000: DDIM's stride is 83
    ):
        for scheduler in (theirs, ours):
            change(scheduler)
            scheduler.set_timesteps(scheduler.num_inference_steps)
        check_trajectory(theirs, ours)
    for scheduler in (theirs, ours):  # the same list; another stride
        scheduler.num_inference_steps, scheduler.timesteps = 5, scheduler.timesteps.clone()
    check_trajectory(theirs, ours)


def test_few_plans_are_kept():
    _, fast = pair(DDPMScheduler)
    for n in range(1, 20):
        fast.set_timesteps(n)
        fast.step(M, fast.timesteps[0], X, generator())
    assert len(fast._plans) == 4


def test_elements_of_a_list_set_again_are_recognised_by_their_address():
    _, fast = pair(DDPMScheduler, 10)
    for _ in range(3):
        fast.set_timesteps(10)
        fast.step(M, fast.timesteps[0], X, generator())
        plan = fast._plan
        assert plan.first_address == fast.timesteps[0].data_ptr()
        assert plan.end_address == fast.timesteps[9].data_ptr() + 8


def test_an_eta_that_changes_at_each_call(made):
    stock, fast = pair(DDIMScheduler, 50)
    for i in range(200):
        check_step(stock, fast, M, 500, X, eta=i / 200)
    plan = fast._plan
    assert made == [1] * 200
    assert max(map(len, (plan.listed, plan.all, plan.once))) <= 32
    for _ in range(100):  # the list's at the second time, and no more
        fast.step(M, 500, X, eta=0.3123, generator=generator())
    assert made[200:] == [1, 50]
    for i in range(100):
        for _ in range(2):
            fast.step(M, 500, X, eta=i / 100, generator=generator())
            fast.step(M, 501, X, eta=i / 100, generator=generator())  # not of the list
    assert max(map(len, (plan.listed, plan.all, plan.once))) <= 32


@pytest.mark.parametrize("num_steps", WITH_MINUS_ONE)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_serves_the_minus_one_of_a_list(prediction, variance, num_steps):
    config = {"timestep_spacing": "trailing", "variance_type": variance}
    stock, fast = pair(DDPMScheduler, num_steps, prediction_type=prediction, **config)
    assert stock.timesteps[-1] == -1
    check_trajectory(stock, fast, doubled=variance == "learned_range")
    drawn = generator()
    fast.set_noise(seed=3)
    m = output_of_model(0, doubled=variance == "learned_range")
    for t in (-1, np.int64(-1), torch.tensor(-1), fast.timesteps[-1]):
        last = fast.step(m, t, X, generator=drawn).prev_sample
        assert torch.equal(last, fast.step(m, -1, X).prev_sample)
    assert torch.equal(drawn.get_state(), generator().get_state())


@pytest.mark.parametrize("num_steps", WITH_MINUS_ONE)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddim_serves_the_minus_one_of_a_list(num_steps, eta, to_one, dtype):
    config = {"timestep_spacing": "trailing", "set_alpha_to_one": to_one}
    stock, fast = pair(DDIMScheduler, num_steps, **config)
    check_trajectory(stock, fast, eta=eta)
    x, m = X.to(dtype), M.to(dtype)
    check_step(stock, fast, m, -1, x, eta=eta)
    noise = randn(SHAPE, seed=3, stream=1, index=1000)  # of no other timestep
    fast.set_noise(seed=3)
    ours = fast.step(m, -1, x, eta).prev_sample
    theirs = stock.step(m, -1, x, eta, variance_noise=noise.to(dtype)).prev_sample
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("stock", BOTH)
def test_a_minus_one_that_no_list_holds(stock):
    _, fast = pair(stock, 20)
    for t in (-1, torch.tensor(-1), torch.tensor([500, -1])):
        with pytest.raises(ValueError, match="0 … 999; got -1"):
            fast.step(M, t, X)


@pytest.mark.parametrize("stock", BOTH)
def test_loops_that_jump_are_decided_by_torchs_seed(stock):
    more = {"eta": 1.0} if stock is DDIMScheduler else {}

    def walk(scheduler, timesteps):
        torch.manual_seed(4)
        return [scheduler.step(M, t, X, **more).prev_sample for t in timesteps]

    _, fast = pair(stock, 20)
    for before, then in [([950, 700], [600, 300]), ([950, 900], [800, 750]), ([950], [850, 800])]:
        walk(fast, before)
        second = walk(fast, then)
        _, new = pair(stock, 20)
        for one, two in zip(second, walk(new, then), strict=True):
            assert torch.equal(one, two)


def test_without_set_timesteps_the_list_is_of_all():
    fast = FAST[DDPMScheduler]()
    seeds = []
    for t in (999, 998, 997, 500, 499, 600):
        fast.step(M, t, X)
        seeds.append(fast._seed)
    assert len(set(seeds[:3])) == len(set(seeds[3:5])) == 1
    assert len(set(seeds)) == 3
