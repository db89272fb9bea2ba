"""Buffers of an accelerated GaussianDiffusion that change after its tables were made."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from lucidrains_models import SIZE, both, images, seeded, stock_diffusion
from lucidrains_package import package_or_skip

from ddpm_fast import accelerate

package = package_or_skip()
EMA = import_module("ema_pytorch").EMA
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"timesteps": 25}


def test_buffers_that_change():
    """Loaded, moved and cast after acceleration, and after the tables were made."""
    config = {"timesteps": 25, "self_condition": False}
    other = stock_diffusion(package, beta_schedule="cosine", **config)
    expected, _ = seeded(lambda: other.sample(2))
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 12, 24])
    noised = other.q_sample(x0, t, torch.ones_like(x0))
    for assign in (False, True):
        _, fast = both(package, beta_schedule="linear", **config)
        unlike, _ = seeded(lambda fast=fast: fast.sample(2))
        assert (unlike - expected).abs().max() > 1e-2
        fast.q_sample(x0, t)
        fast.load_state_dict(copy.deepcopy(other).state_dict(), assign=assign)
        found, _ = seeded(lambda fast=fast: fast.sample(2))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(fast.q_sample(x0, t, torch.ones_like(x0)), noised)
    fast.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(fast.q_sample(x0, t, torch.ones_like(x0)), noised, rtol=0, atol=0.02)
    assert not torch.equal(fast.q_sample(x0, t, torch.ones_like(x0)), noised)


def test_buffers_made_under_inference_mode():
    with torch.inference_mode():
        stock, fast = both(package, timesteps=25)
    theirs, _ = seeded(lambda: stock.sample(2))
    ours, _ = seeded(lambda: fast.sample(2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def same(stock, fast, call):
    """Whether both return the same for one seed."""
    theirs, _ = seeded(lambda: call(stock))
    ours, _ = seeded(lambda: call(fast))
    return bool((theirs - ours).abs().max() < 1e-4)


def p_samples(diffusion):
    """A loop of a user's."""
    x = torch.randn(2, 3, SIZE, SIZE)
    for t in reversed(range(25)):
        x, _ = diffusion.p_sample(x, t)
    return x


CALLS = {
    "ddpm": lambda diffusion: diffusion.p_sample_loop((2, 3, SIZE, SIZE)),
    "ddim": lambda diffusion: diffusion.ddim_sample((2, 3, SIZE, SIZE)),
    "interpolate": lambda diffusion: diffusion.interpolate(images(2), images(2, seed=1), lam=0.3),
    "p_sample": p_samples,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_average_made_before_another_schedule_is_loaded(call):
    """ema_pytorch copies buffers through .data, which counts no version."""
    other = stock_diffusion(package, beta_schedule="linear", **CONFIG)
    averages = []
    for diffusion in both(package, beta_schedule="cosine", **CONFIG):
        ema = EMA(diffusion, update_every=1, update_after_step=100)
        seeded(lambda ema=ema: call(ema.ema_model))  # the tables are made
        diffusion.load_state_dict(copy.deepcopy(other.state_dict()))
        ema.update()
        averages.append(ema.ema_model)
    assert torch.equal(averages[1].betas, other.betas)
    assert same(*averages, call)


def test_an_average_that_is_loaded():
    """Its diffusion is a part of what is loaded."""
    stock, fast = (EMA(d) for d in both(package, beta_schedule="cosine", **CONFIG))
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 12, 24])

    def q_sample(ema):
        return ema.ema_model.q_sample(x0, t)

    assert same(stock, fast, q_sample)
    other = EMA(stock_diffusion(package, beta_schedule="linear", **CONFIG)).state_dict()
    with torch.inference_mode():
        inference = {name: tensor.clone() for name, tensor in other.items()}
    for states in (other, inference):
        for ema in (stock, fast):
            ema.load_state_dict(states)
        assert same(stock, fast, q_sample)


@pytest.mark.parametrize("way", ["accelerate", "load_state_dict", "to"])
def test_data_written_to_in_training(way):
    """Is not looked for, but there are ways to say it."""
    stock, fast = both(package, beta_schedule="cosine", **CONFIG)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 12, 24])
    fast.q_sample(x0, t)
    for diffusion in (stock, fast):
        diffusion.sqrt_one_minus_alphas_cumprod.data.mul_(0.5)
    if way == "accelerate":
        accelerate(fast, noise="torch")
    elif way == "load_state_dict":
        fast.load_state_dict(fast.state_dict())
    else:
        fast.to("cpu")
    assert same(stock, fast, lambda diffusion: diffusion.q_sample(x0, t))


def test_unchanged_buffers_keep_their_tables():
    """NaNs among them as well, which are unlike themselves."""
    _, fast = both(package, beta_schedule="linear", timesteps=20)
    assert fast.alphas_cumprod[-1] == 0
    fast.posterior_mean_coef1[3] = torch.nan
    fast.sample(1)
    made = dict(fast._tables._made)
    assert made
    fast.sample(1)
    assert all(fast._tables._made[key] is entry for key, entry in made.items())
