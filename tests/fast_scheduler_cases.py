"""diffusers' schedulers beside the fast ones, and what counts as the same result."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from helpers import ulp

from ddpm_fast import randn
from ddpm_fast.integrations.diffusers.schedulers import FastDDIMScheduler, FastDDPMScheduler

FAST = {DDPMScheduler: FastDDPMScheduler, DDIMScheduler: FastDDIMScheduler}
BOTH = [DDPMScheduler, DDIMScheduler]
SHAPE = (2, 3, 6, 5)


def pair(stock, num_steps=None, **config):
    """The stock scheduler and the fast one, of the same config and timesteps."""
    schedulers = stock(**config), FAST[stock](**config)
    if num_steps is not None:
        for scheduler in schedulers:
            scheduler.set_timesteps(num_steps)
    return schedulers


def output_of_model(row, shape=SHAPE, doubled=False):
    """Like a trained model's: noise of unit size; the second half in (−1, 1)."""
    samples, channels, *rest = shape
    m = randn((samples, (1 + doubled) * channels, *rest), seed=1000 + row)
    m[:, channels:] = m[:, channels:].tanh()
    return m


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(fast, stock, exact, more_ulps=0):
    """Both results of a step as near to the stock formula in float64, NaN and ∞ in the same
    places; where x̂₀ is infinite the next state is one of them."""
    infinite = stock.pred_original_sample.isinf()
    for name in ("prev_sample", "pred_original_sample"):
        ours, theirs, wanted = (getattr(out, name) for out in (fast, stock, exact))
        ours_dtype = ours.dtype
        assert ours_dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
        assert torch.equal(ours.isnan() & ~infinite, theirs.isnan() & ~infinite), name
        ours, theirs, wanted = (out.nan_to_num(0, 0, 0).double() for out in (ours, theirs, wanted))
        # The tensors are small and so the worst of a few roundings: three times theirs, two ulp.
        # In float64 theirs is the measure itself; x̂₀ has terms of 1/√ᾱ that cancel.
        allowed = 3 * (theirs - wanted).abs().max() + 2 * ulp(
            ours_dtype
        ) * wanted.abs().max().clamp(1)
        allowed += more_ulps * ulp(torch.float32) * wanted.abs().max().clamp(1)
        if ours_dtype == torch.float64:
            allowed = 1e-11 * wanted.abs().max().clamp(1)
        error = (ours - wanted).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_step(stock, fast, m, t, x, **arguments):
    """One step of both from the same state; returns the stock result."""
    seed = int(t) + 1
    drawn = {"generator": generator(seed)} if "variance_noise" not in arguments else {}
    theirs = stock.step(m, t, x, **drawn, **arguments)
    if drawn:
        drawn["generator"] = generator(seed)
    ours = fast.step(m, t, x, **drawn, **arguments)
    # Their formula in float64, of their tables' numbers and of the noise as it was drawn.
    exact = copy.copy(stock)
    noise = torch.randn(x.shape, generator=generator(seed), dtype=m.dtype).double()
    if isinstance(stock, DDIMScheduler):
        arguments.setdefault("variance_noise", noise)
        wanted = exact.step(m.double(), t, x.double(), **arguments)
    else:
        wanted = _with_noise(exact, noise, m.double(), t, x.double(), **arguments)
    # A range of logarithms that begins at log 1e-20 = −46: of that size their roundings are.
    long_range = stock.config.get("variance_type") == "learned_range" and int(t) > 0 > int(
        stock.previous_timestep(t)
    )
    assert_same(ours, theirs, wanted, 16 if long_range else 0)
    return theirs


def _with_noise(scheduler, noise, *arguments, **more):
    with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=noise):
        return scheduler.step(*arguments, **more)


def check_trajectory(stock, fast, steps=None, doubled=False, **arguments):
    """Every step from the stock scheduler's own state, for as long as that is finite."""
    x = randn(SHAPE, seed=5)
    timesteps = stock.timesteps if steps is None else steps
    for row, t in enumerate(timesteps):
        m = output_of_model(row, doubled=doubled)
        x = check_step(stock, fast, m, t, x, **arguments).prev_sample
        if not x.isfinite().all():
            break
