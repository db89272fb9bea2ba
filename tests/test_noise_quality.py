"""Statistics of 10⁷ values. Seeds are fixed: a failure is a defect, not bad luck; the bounds are
such that a fresh seed of a perfect generator would fail one of them about once in 10⁴ runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from ddpm_fast import randn

N = 10_000_000
BOUND = 4.9  # standard errors; two-sided probability 1e-6 a test


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return randn([100, N // 100], seed=20260101).numpy().astype(np.float64).ravel()


def test_moments(values):
    """Standard errors of the first four moments of N(0, 1): 1, √2, √6, √24 over √N."""
    mean, std = values.mean(), values.std()
    skewness = ((values - mean) ** 3).mean() / std**3
    kurtosis = ((values - mean) ** 4).mean() / std**4 - 3
    root = math.sqrt(N)
    assert abs(mean) < BOUND / root
    assert abs(std**2 - 1) < BOUND * math.sqrt(2) / root
    assert abs(skewness) < BOUND * math.sqrt(6) / root
    assert abs(kurtosis) < BOUND * math.sqrt(24) / root


def test_kolmogorov_smirnov(values):
    statistic = stats.kstest(values, stats.norm.cdf).statistic
    assert statistic * math.sqrt(N) < 2.7  # P(K > 2.7) = 2 exp(−2 · 2.7²) = 9e-7


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.5, 5.0])
def test_tails(values, bound):
    expected = N * special.erfc(bound / math.sqrt(2)) / 2
    for count in ((values > bound).sum(), (values < -bound).sum()):
        assert abs(count - expected) < BOUND * math.sqrt(expected) + 1
    assert np.abs(values).max() > 5  # P(none of 10⁷ beyond 5) = exp(−5.7)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).mean()) * math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 32, 1024])
def test_no_correlation_between_elements(lag):
    z = randn([8, 500_000], seed=11)
    assert abs(correlation(z[:, :-lag], z[:, lag:])) < BOUND
    squares = z**2 - 1
    assert abs(correlation(squares[:, :-lag], squares[:, lag:])) / 2 < BOUND


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 12},
        {"seed": 11 + 2**32},
        {"sample_ids": range(1, 9)},
        {"sample_ids": range(2**32, 2**32 + 8)},
        {"stream": 1},
        {"index": 1},
    ],
    ids=str,
)
def test_no_correlation_between_addresses(change):
    address = {"seed": 11, "sample_ids": range(8), "stream": 0, "index": 0}
    a, b = randn([8, 500_000], **address), randn([8, 500_000], **{**address, **change})
    assert abs(correlation(a, b)) < BOUND
    assert abs(correlation(a**2 - 1, b**2 - 1)) / 2 < BOUND


def test_pairs_fill_the_disc_evenly():
    """cos and sin of one pair: the angle is uniform, and independent of the radius."""
    z = randn([4, 1_000_000], seed=13).double().reshape(-1, 2)
    angle = torch.atan2(z[:, 1], z[:, 0]).numpy() / (2 * np.pi) + 0.5
    radius = np.exp(-0.5 * (z**2).sum(1).numpy())
    counts, _, _ = np.histogram2d(angle, radius, bins=16, range=[[0, 1], [0, 1]])
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < stats.chi2.ppf(1 - 1e-6, 255)
