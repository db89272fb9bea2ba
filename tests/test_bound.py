"""The variational bound of the reference against closed forms, in float64.

For Gaussian data everything is quadratic in (x_0, ε), and a Gauss-Hermite rule of a few nodes takes
expectations exactly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, reference

STD = 0.7  # of the data
SCHEDULES = [NoiseSchedule.linear(50), NoiseSchedule.cosine(10), NoiseSchedule.linear(1000)]


def nodes():
    """Pairs (x_0 / STD, ε) as [N, 1] each, and their weights."""
    points, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    a, b = np.meshgrid(points, points, indexing="ij")
    pair = [torch.from_numpy(v.reshape(-1, 1)) for v in (a, b)]
    return *pair, torch.from_numpy(np.outer(weights, weights).reshape(-1))


def optimal(x_t, t, schedule):
    """E[ε | x_t] for x_0 ~ N(0, STD²), and the variance of x_{t-1} given x_t."""
    abar, rest = schedule.alphas_cumprod[t], schedule.one_minus_alphas_cumprod[t]
    total = abar * STD**2 + rest
    x0_variance = STD**2 * rest / total
    variance = schedule.posterior_variance[t] + schedule.posterior_mean_coef1[t] ** 2 * x0_variance
    return rest.sqrt() * x_t / total, variance


def terms(schedule, variance, wrong=0.0):
    """E of each step's term in nats, t ascending; at t = 0 with a continuous decoder."""
    x0, eps, weights = nodes()
    x0 = STD * x0
    found = []
    for i in range(len(schedule)):
        t = torch.full((len(x0),), i)
        x_t = reference.q_sample(x0, t, schedule, eps)
        predicted, exact = optimal(x_t, i, schedule)
        predicted = predicted + wrong
        if variance == "learned":
            predicted = torch.cat([predicted, exact.log().expand_as(x_t)], 1)
        kwargs = {"variance": variance}
        if i:
            term = reference.vlb_terms(x0, x_t, predicted, t, schedule, **kwargs) * math.log(2)
        else:
            mean, log_variance, _ = reference.p_mean_log_variance(
                x_t, predicted, t, schedule, **kwargs
            )
            term = 0.5 * (log_variance + math.log(2 * math.pi))
            term = (term + 0.5 * (x0 - mean) ** 2 / log_variance.exp())[:, 0]
        found.append((weights * term).sum().item())
    prior = (weights * reference.prior_kl(x0, schedule)).sum().item() * math.log(2)
    return prior, np.array(found)


ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(len(s)))
def test_the_optimal_chain_reaches_the_entropy(schedule):
    """With p(x_{t-1} | x_t) = q(x_{t-1} | x_t) the bound is the data's entropy plus
    KL(q(x_T) ‖ N(0, 1)), for any number of steps."""
    prior, each = terms(schedule, "learned")
    total = schedule.alphas_cumprod[-1] * STD**2 + schedule.one_minus_alphas_cumprod[-1]
    at_the_end = 0.5 * (total - 1 - total.log()).item()
    assert prior + each.sum() == pytest.approx(ENTROPY + at_the_end, abs=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(len(s)))
def test_no_other_choice_falls_below_the_entropy(schedule, variance):
    prior, each = terms(schedule, variance)
    best = terms(schedule, "learned")[1]
    assert prior + each.sum() > ENTROPY + 1e-6
    assert (each[1:] >= best[1:] - 1e-12).all()
    assert terms(schedule, variance, wrong=0.1)[1].sum() > each.sum()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_terms_are_weighted_regression_on_eps(prediction):
    """fixed_large, unclipped: KL = β (ε − ε_θ)² / (2 α (1−ᾱ)) + ½ (ln(β/β̃) + β̃/β − 1)
    [Ho, eq. 12], whatever the model predicts."""
    schedule = NoiseSchedule.linear(100)
    generator = torch.Generator().manual_seed(0)
    x0, eps, wrong = (torch.randn(99, 2, 3, generator=generator).double() for _ in range(3))
    t = torch.arange(1, 100)
    x_t = reference.q_sample(x0, t, schedule, eps)
    predicted_x0 = reference.x0_from_eps(x_t, wrong, t, schedule)
    output = reference.denoising_target(predicted_x0, wrong, t, schedule, prediction)
    found = reference.vlb_terms(
        x0, x_t, output, t, schedule, prediction=prediction, variance="fixed_large"
    )
    beta, alpha = schedule.betas[t], schedule.alphas[t]
    ratio = schedule.posterior_variance[t] / beta
    weight = beta / (2 * alpha * schedule.one_minus_alphas_cumprod[t])
    expected = weight * reference.regression(eps, wrong) + 0.5 * (ratio - 1 - ratio.log())
    torch.testing.assert_close(found * math.log(2), expected, rtol=1e-9, atol=1e-12)


def test_the_first_term_is_the_decoders():
    schedule = NoiseSchedule.cosine(20)
    x0 = (torch.arange(256).double() / 127.5 - 1).reshape(4, 1, 64)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).double()
    t = torch.zeros(4, dtype=torch.int64)
    x_t = reference.q_sample(x0, t, schedule, eps)
    for cdf in ("exact", "tanh"):
        found = reference.vlb_terms(x0, x_t, eps, t, schedule, clip=(-1.0, 1.0), cdf=cdf)
        mean, log_variance, x0_hat = reference.p_mean_log_variance(
            x_t, eps, t, schedule, clip=(-1.0, 1.0)
        )
        assert x0_hat.abs().max() <= 1
        nats = reference.decoder_nll(x0, mean, 0.5 * log_variance, cdf).flatten(1).mean(1)
        torch.testing.assert_close(found, nats / math.log(2))


def test_variances_between_their_bounds():
    """v = −1 is β̃, v = 1 is β, and at t = 0 both choices that are fixed take β̃ of t = 1."""
    schedule = NoiseSchedule.linear(30)
    t = torch.arange(30)
    x, m = (torch.zeros(30, 1, 2).double() for _ in range(2))

    def log_variance(output, variance):
        return reference.p_mean_log_variance(x, output, t, schedule, variance=variance)[1][:, 0, 0]

    small, large = log_variance(m, "fixed_small"), log_variance(m, "fixed_large")
    assert small[0] == large[0] == schedule.posterior_variance[1].log()
    torch.testing.assert_close(small[1:], schedule.posterior_variance[1:].log())
    torch.testing.assert_close(large[1:], schedule.betas[1:].log())
    lowest = log_variance(torch.cat([m, m - 1], 1), "learned_range")
    highest = log_variance(torch.cat([m, m + 1], 1), "learned_range")
    torch.testing.assert_close(lowest, schedule.posterior_log_variance_clipped)
    torch.testing.assert_close(highest, schedule.betas.log())
    torch.testing.assert_close(log_variance(torch.cat([m, m - 3], 1), "learned"), small * 0 - 3)
