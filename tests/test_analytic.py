"""Samplers against closed forms. For Gaussian data the best ε is affine in x, so the whole chain is
Gaussian and its mean and covariance follow from a recursion written here from the papers, not from
the step table. For a mixture the expectation of any function of the sample follows by quadrature,
backwards through the chain.

Bounds are 5 standard errors: a fresh seed would fail one of the 170 comparisons in 10⁴ runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.interpolate import CubicSpline

from ddpm_fast import NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.linear()
MEAN = np.array([0.5, -1.0, 0.2])
ROOT = np.array([[0.9, 0.0, 0.0], [-0.5, 0.4, 0.0], [0.2, 0.3, 0.6]])
COVARIANCE = ROOT @ ROOT.T
BOUND = 5.0

METHODS = [
    ("ddpm", "fixed_small", 0.0),
    ("ddpm", "fixed_large", 0.0),
    ("ddpm", "learned", 0.0),
    ("ddpm", "learned_range", 0.0),
    ("ddim", "fixed_small", 0.0),
    ("ddim", "fixed_small", 1.0),
]
# Each at 50 steps, and at all 1000: of those two in every run, a second or more each.
IN_EVERY_RUN = METHODS[3:5]
CASES = [
    pytest.param(
        *method, steps, marks=[pytest.mark.slow] * (steps == 1000 and method not in IN_EVERY_RUN)
    )
    for method in METHODS
    for steps in (50, 1000)
]
LOG_MIX = 0.3  # the learned log-variance: this far from log β̃ to log β


def trajectory(num_steps):
    """(ᾱ, ᾱ′) along the leading spacing, first step first, from the betas alone."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    steps = np.arange(num_steps)[::-1] * (1000 // num_steps)
    return list(zip(steps, bar[steps], np.append(bar[steps[1:]], 1.0), strict=True))


def sigma_squared(bar, prev, variance):
    """The reverse variance: β̃, β, or between them (Nichol & Dhariwal, eq. 15)."""
    beta = 1 - bar / prev
    posterior = beta * (1 - prev) / (1 - bar)
    if variance == "fixed_small":
        return posterior
    if variance == "fixed_large":
        return beta
    return math.exp(LOG_MIX * math.log(beta) + (1 - LOG_MIX) * math.log(posterior))


def step_coefficients(bar, prev, method, variance, eta):
    """x′ = a x̂₀ + b x + σ z: eq. 7 of Ho et al., eq. 12 of Song et al."""
    if method == "ddpm":
        beta = 1 - bar / prev
        a = math.sqrt(prev) * beta / (1 - bar)
        b = math.sqrt(bar / prev) * (1 - prev) / (1 - bar)
        sigma2 = 0.0 if prev == 1 else sigma_squared(bar, prev, variance)
    else:
        sigma2 = eta**2 * (1 - prev) / (1 - bar) * (1 - bar / prev)
        b = math.sqrt(max(1 - prev - sigma2, 0)) / math.sqrt(1 - bar)
        a = math.sqrt(prev) - math.sqrt(bar) * b
    return a, b, math.sqrt(sigma2)


def learned_channels(variance, num_steps):
    """t → the model's variance channel: log σ² itself, or v with (v + 1)/2 = LOG_MIX."""
    if variance == "learned_range":
        return lambda t: 2 * LOG_MIX - 1
    by_t = {
        t: 0.0 if prev == 1 else math.log(sigma_squared(bar, prev, variance))
        for t, bar, prev in trajectory(num_steps)
    }
    return lambda t: by_t[t]


def with_variance_channels(eps, t, variance, num_steps):
    if not variance.startswith("learned"):
        return eps
    value = learned_channels(variance, num_steps)(int(t[0]))
    return torch.cat([eps, torch.full_like(eps, value)], 1)


def gaussian_model(variance, num_steps):
    """E[ε | x_t] for x_0 ~ N(MEAN, COVARIANCE): √(1−ᾱ)(ᾱ Σ + (1−ᾱ) I)⁻¹ (x_t − √ᾱ μ)."""
    bars = SCHEDULE.alphas_cumprod.numpy()

    def model(x, t):
        bar = bars[int(t[0])]
        gain = math.sqrt(1 - bar) * np.linalg.inv(bar * COVARIANCE + (1 - bar) * np.eye(3))
        centred = x.double() - math.sqrt(bar) * torch.from_numpy(MEAN)[:, None]
        eps = torch.einsum("ij,njk->nik", torch.from_numpy(gain), centred).float()
        return with_variance_channels(eps, t, variance, num_steps)

    return model


@pytest.mark.parametrize(("method", "variance", "eta", "num_steps"), CASES)
def test_gaussian(method, variance, eta, num_steps):
    n = 20_000
    sampler = Sampler(
        gaussian_model(variance, num_steps),
        SCHEDULE,
        variance=variance,
        method=method,
        eta=eta,
        num_steps=num_steps,
        clip=None,
    )
    samples = sampler.sample([n, 3, 1], seed=1)[:, :, 0].double().numpy()

    mean, covariance = np.zeros(3), np.eye(3)
    for _, bar, prev in trajectory(num_steps):
        a, b, sigma = step_coefficients(bar, prev, method, variance, eta)
        gain = (1 - bar) * np.linalg.inv(bar * COVARIANCE + (1 - bar) * np.eye(3))
        # x̂₀ = (x − √(1−ᾱ) ε)/√ᾱ = (x − gain (x − √ᾱ μ))/√ᾱ
        x0_matrix = (np.eye(3) - gain) / math.sqrt(bar)
        x0_offset = gain @ MEAN
        matrix, offset = a * x0_matrix + b * np.eye(3), a * x0_offset
        mean = matrix @ mean + offset
        covariance = matrix @ covariance @ matrix.T + sigma**2 * np.eye(3)

    diagonal = np.diag(covariance)
    assert np.all(np.abs(samples.mean(0) - mean) < BOUND * np.sqrt(diagonal / n))
    error = np.cov(samples.T) - covariance
    # Var of a sample covariance of Gaussians: (Σ_ii Σ_jj + Σ_ij²)/n
    allowed = BOUND * np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / n)
    assert np.all(np.abs(error) < allowed)
    if num_steps == 1000 and eta == 0 and method == "ddim":  # and the chain is near the data
        np.testing.assert_allclose(covariance, COVARIANCE, atol=0.02)


WEIGHTS, CENTRES, WIDTHS = np.array([0.3, 0.7]), np.array([-1.2, 0.8]), np.array([0.25, 0.4])


def mixture_eps(x, bar):
    """E[ε | x_t] for the mixture Σ w N(c, s²), in float64."""
    centres, variances = math.sqrt(bar) * CENTRES, bar * WIDTHS**2 + 1 - bar
    away = x[..., None] - centres
    log_density = np.log(WEIGHTS) - 0.5 * np.log(variances) - away**2 / (2 * variances)
    log_density -= log_density.max(-1, keepdims=True)
    share = np.exp(log_density)
    share /= share.sum(-1, keepdims=True)
    return math.sqrt(1 - bar) * (share * away / variances).sum(-1)


@pytest.mark.parametrize(("method", "variance", "eta", "num_steps"), CASES)
def test_mixture(method, variance, eta, num_steps):
    n = 20_000
    bars = SCHEDULE.alphas_cumprod.numpy()

    def model(x, t):
        eps = torch.from_numpy(mixture_eps(x.double().numpy(), bars[int(t[0])])).float()
        return with_variance_channels(eps, t, variance, num_steps)

    sampler = Sampler(
        model,
        SCHEDULE,
        variance=variance,
        method=method,
        eta=eta,
        num_steps=num_steps,
        clip=None,
    )
    samples = sampler.sample([n // 100, 1, 100], seed=2).double().numpy().ravel()

    # u_t(x) = E[g(x_0) | x_t = x], from t = 0 up: u_t(x) = E_z[u_{t-1}(f_t(x) + σ_t z)].
    grid = np.linspace(-7, 7, 2401)
    nodes, node_weights = hermegauss(24)
    node_weights = node_weights / node_weights.sum()
    powers = np.stack([grid, grid**2, grid**3, grid**4])
    for _, bar, prev in reversed(trajectory(num_steps)):
        a, b, sigma = step_coefficients(bar, prev, method, variance, eta)
        x0_hat = (grid - math.sqrt(1 - bar) * mixture_eps(grid, bar)) / math.sqrt(bar)
        means = a * x0_hat + b * grid
        spline = CubicSpline(grid, powers, axis=1)
        if sigma == 0:
            powers = spline(means)
        else:
            powers = spline(means[:, None] + sigma * nodes) @ node_weights
    end = CubicSpline(grid, powers, axis=1)
    dense_nodes, dense_weights = hermegauss(120)
    moments = end(dense_nodes) @ (dense_weights / dense_weights.sum())

    mean, second = moments[0], moments[1]
    assert abs(samples.mean() - mean) < BOUND * math.sqrt((second - mean**2) / n)
    spread = math.sqrt((moments[3] - second**2) / n)
    assert abs((samples**2).mean() - second) < BOUND * spread
