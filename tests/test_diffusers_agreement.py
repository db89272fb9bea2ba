"""Every step of whole trajectories against diffusers' schedulers, fed the same noise.

Their tables are float32 products of a thousand factors; put on float64 tables (their formulas stay)
they agree with ours to float32 rounding of the terms of the step. As shipped they agree to what
those tables lose: 4e-4 of the noise's scale."""

from __future__ import annotations

import pytest
import torch
from helpers import ulp

from ddpm_fast import NoiseSchedule, randn, reverse_step

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 8, 8)
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(1000, 1e-4, 0.02),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
}


def scheduler_of(cls, beta_schedule, exact, **config):
    scheduler = cls(beta_schedule=beta_schedule, **config)
    if exact:
        schedule = SCHEDULES[beta_schedule]
        scheduler.betas, scheduler.alphas = schedule.betas, schedule.alphas
        scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler


def model_output(x, row, channels):
    """Something like a trained model's: noise of unit size, and v in (−1, 1)."""
    m = randn((SHAPE[0], channels, *SHAPE[2:]), seed=1000 + row)
    if channels == 2 * SHAPE[1]:
        m[:, SHAPE[1] :] = m[:, SHAPE[1] :].tanh()
    return m


def walk(scheduler, table, step_kwargs, num_steps):
    """Yields (row, x, m, theirs, ours, magnitude) along their trajectory."""
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    channels = SHAPE[1] * (1 if table.model_variance == "none" else 2)
    x = randn(SHAPE, seed=5)
    for row, t in enumerate(scheduler.timesteps):
        m = model_output(x, row, channels)
        generator = torch.Generator().manual_seed(row)
        theirs = scheduler.step(m, t, x, generator=generator, **step_kwargs).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(row))
        ours = reverse_step(x, m, table, row, seed=0, noise=noise)
        r, c_x, c_m, b_0, b_x, b_m, sigma = table.rows[row, :7].tolist()
        size = max(abs(x).max().item(), abs(m[:, : SHAPE[1]]).max().item(), 1.0)
        x0_terms = r * (abs(c_x) + abs(c_m)) * size
        terms = abs(b_0) * max(x0_terms, 1) + (abs(b_x) + abs(b_m) + sigma) * size
        yield row, theirs, ours, terms
        x = theirs


@pytest.mark.parametrize("num_steps", [1000, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_ddpm(beta_schedule, variance, prediction, num_steps):
    scheduler = scheduler_of(
        diffusers.DDPMScheduler,
        beta_schedule,
        exact=True,
        variance_type=variance,
        prediction_type=prediction,
    )
    table = SCHEDULES[beta_schedule].step_table(
        prediction=prediction, variance=variance, num_steps=num_steps
    )
    for row, theirs, ours, terms in walk(scheduler, table, {}, num_steps):
        assert (theirs - ours).abs().max() < 6 * ulp(torch.float32) * terms, row


@pytest.mark.parametrize("num_steps", [1000, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim(clipped, eta, prediction, num_steps):
    scheduler = scheduler_of(
        diffusers.DDIMScheduler, "linear", exact=True, prediction_type=prediction
    )
    table = SCHEDULES["linear"].step_table(
        prediction=prediction,
        variance="fixed_small",
        method="ddim",
        eta=eta,
        eps_source="x0" if clipped else "model",
        num_steps=num_steps,
    )
    kwargs = {"eta": eta, "use_clipped_model_output": clipped}
    for row, theirs, ours, terms in walk(scheduler, table, kwargs, num_steps):
        # Their ε from x̂₀ divides by √(1−ᾱ), 0.01 at the end.
        root = SCHEDULES["linear"].sqrt_one_minus_alphas_cumprod[table.timesteps[row]].item()
        allowed = 6 * ulp(torch.float32) * terms * (1 / root if clipped or eta else 1)
        assert (theirs - ours).abs().max() < allowed, row


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_as_shipped(variance):
    scheduler = scheduler_of(diffusers.DDPMScheduler, "linear", exact=False, variance_type=variance)
    table = SCHEDULES["linear"].step_table(prediction="epsilon", variance=variance)
    for row, theirs, ours, _ in walk(scheduler, table, {}, 1000):
        assert (theirs - ours).abs().max() < 1e-4, row
