"""The Fréchet distance: closed forms, invariances, singular covariances, streaming."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.training.digits import load_digits
from ddpm_fast.training.frechet import (
    DigitsFeatures,
    InceptionFeatures,
    Moments,
    frechet_distance,
)


def random_covariance(rng, dimensions, rank=None):
    root = rng.normal(size=(dimensions, rank or dimensions))
    return root @ root.T / dimensions


def orthogonal(rng, dimensions):
    return np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]


# The distance -------------------------------------------------------------------------------


@given(st.floats(-5, 5), st.floats(0, 4), st.floats(-5, 5), st.floats(0, 4))
def test_in_one_dimension(mu1, sd1, mu2, sd2):
    found = frechet_distance([mu1], [[sd1**2]], [mu2], [[sd2**2]])
    assert found == pytest.approx((mu1 - mu2) ** 2 + (sd1 - sd2) ** 2, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 5, 64])
def test_covariances_that_commute(dimensions):
    """Σᵢ = Q diag(sᵢ²) Qᵀ: d² = ‖μ₁ − μ₂‖² + ‖s₁ − s₂‖²."""
    rng = np.random.default_rng(dimensions)
    q = orthogonal(rng, dimensions)
    s1, s2 = rng.uniform(0, 3, (2, dimensions))
    mu1, mu2 = rng.normal(size=(2, dimensions))
    found = frechet_distance(mu1, (q * s1**2) @ q.T, mu2, (q * s2**2) @ q.T)
    assert found == pytest.approx(((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("dimensions", [2, 7, 50])
def test_covariances_that_do_not(dimensions):
    """As scipy's matrix square root has it, where that is safe."""
    rng = np.random.default_rng(dimensions)
    a, b = random_covariance(rng, dimensions), random_covariance(rng, dimensions)
    mu1, mu2 = rng.normal(size=(2, dimensions))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(mu1, a, mu2, b) == pytest.approx(expected, rel=1e-9)


def test_in_two_dimensions_by_hand():
    """tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂)."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 1 + 4 + 10 - 2 * root
    assert frechet_distance([0, 0], a, [1, 2], b) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12))
def test_invariances(seed, dimensions):
    rng = np.random.default_rng(seed)
    a, b = random_covariance(rng, dimensions), random_covariance(rng, dimensions)
    mu1, mu2 = rng.normal(size=(2, dimensions))
    found = frechet_distance(mu1, a, mu2, b)
    close = {"rel": 1e-9, "abs": 1e-9}
    assert found >= 0
    assert frechet_distance(mu2, b, mu1, a) == pytest.approx(found, **close)
    q, shift = orthogonal(rng, dimensions), rng.normal(size=dimensions)
    turned = frechet_distance(q @ mu1 + shift, q @ a @ q.T, q @ mu2 + shift, q @ b @ q.T)
    assert turned == pytest.approx(found, **close)
    assert frechet_distance(3 * mu1, 9 * a, 3 * mu2, 9 * b) == pytest.approx(9 * found, **close)
    assert frechet_distance(mu1, a, mu1, a) == pytest.approx(0, abs=1e-9)
    third = random_covariance(rng, dimensions)
    sides = [
        math.sqrt(frechet_distance(mu, c, nu, d))
        for (mu, c), (nu, d) in (
            ((mu1, a), (mu2, b)),
            ((mu1, a), (mu1, third)),
            ((mu1, third), (mu2, b)),
        )
    ]
    assert sides[0] <= sides[1] + sides[2] + 1e-6  # a metric


def test_singular_covariances():
    """Fewer vectors than dimensions, or none that vary."""
    rng = np.random.default_rng(0)
    dimensions = 40
    a, b = random_covariance(rng, dimensions, 3), random_covariance(rng, dimensions, 5)
    zero = np.zeros((dimensions, dimensions))
    mu = np.zeros(dimensions)
    assert frechet_distance(mu, a, mu, zero) == pytest.approx(np.trace(a), rel=1e-12)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-12)
    # Supports at right angles: the roots do not meet.
    q = orthogonal(rng, dimensions)
    first, second = (q[:, :9] * 2.0) @ q[:, :9].T, (q[:, 9:20] * 3.0) @ q[:, 9:20].T
    assert frechet_distance(mu, first, mu, second) == pytest.approx(9 * 2 + 11 * 3, rel=1e-12)
    found = frechet_distance(mu, a, mu, b)
    assert 0 < found < np.trace(a + b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [[1.0]], [0.0, 1.0], np.eye(2)), r"mean2 must be \[D\]"),
        (([0.0, 1.0], [[1.0]], [0.0, 1.0], np.eye(2)), r"covariance1 \[D, D\]"),
        (([math.nan], [[1.0]], [0.0], [[1.0]]), "mean1 and covariance1 must be finite"),
        (([0.0], [[1.0]], [0.0], [[math.inf]]), "mean2 and covariance2 must be finite"),
        (([0.0, 0.0], [[1.0, 2.0], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "must be symmetric"),
        (([0.0, 0.0], np.diag([1.0, -1.0]), [0.0, 0.0], np.eye(2)), "no negative eigenvalue"),
    ],
)
def test_what_is_no_gaussian_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


# Moments ------------------------------------------------------------------------------------


def test_moments_are_numpys_however_they_come():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(301, 6)) @ rng.normal(size=(6, 6)) + 1e6  # far from 0
    for sizes in ([301], [1] * 301, [100, 0, 200, 1]):
        moments, begin = Moments(), 0
        for size in sizes:
            moments.update(x[begin : begin + size])
            begin += size
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)
    halves = Moments(), Moments()
    for half, part in zip(halves, (x[:120], x[120:]), strict=True):
        half.update(torch.from_numpy(part))
    halves[0].merge(halves[1])
    assert halves[0].count == 301
    np.testing.assert_allclose(halves[0].covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)
    empty = Moments()
    empty.merge(halves[1])
    empty.merge(Moments())
    assert empty.count == 181


def test_moments_refuse_what_they_cannot_take():
    moments = Moments()
    moments.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="needs at least 2 vectors; there are 1"):
        _ = moments.covariance
    for bad in (np.ones((2, 4)), np.ones(3), np.ones((2, 3, 1))):
        with pytest.raises(ValueError, match=r"features must be \[N, 3\]"):
            moments.update(bad)
    with pytest.raises(ValueError, match="features must be finite"):
        moments.update(np.full((1, 3), np.nan))
    assert moments.count == 1


# Features -----------------------------------------------------------------------------------


def test_digits_features():
    """Deterministic, of a classifier that knows digits; noise is farther off than other digits."""
    digits = load_digits()
    features, again = DigitsFeatures(), DigitsFeatures()
    held_out = features(digits.held_out_images)
    assert held_out.shape == (360, 32)
    assert np.array_equal(held_out, again(digits.held_out_images))
    images = digits.held_out_images.flatten(1).numpy() / 255
    assert features.classifier.score(images, digits.held_out_labels) > 0.95

    train, test, noise, one = Moments(), Moments(), Moments(), Moments()
    train.update(features(digits.train_images))
    test.update(held_out)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (360, 1, 8, 8), dtype=torch.uint8, generator=generator)
    noise.update(features(pixels))
    one.update(features(digits.train_images[digits.train_labels == 1]))
    assert 0 < train.distance(test) < 0.05 * train.distance(one)
    assert train.distance(test) < 0.05 * train.distance(noise)
    with pytest.raises(ValueError, match=r"uint8 \[N, 1, 8, 8\] images"):
        features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_inception_needs_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionFeatures()


def test_inception_is_called_as_torch_fidelity_wants_it(monkeypatch):
    class Network(torch.nn.Module):
        """Takes what torch-fidelity's takes: uint8 RGB; gives a tuple of what was asked for."""

        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert features_list == ["2048"]
            self.path = feature_extractor_weights_path

        def forward(self, x):
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            return (x.float().flatten(2).mean(2).repeat(1, 683)[:, :2048],)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    features = InceptionFeatures(weights="w.pth")
    images = torch.arange(2 * 48, dtype=torch.uint8).view(2, 3, 4, 4)
    found = features(images)
    assert found.shape == (2, 2048)
    assert found[0, :3].tolist() == [7.5, 23.5, 39.5]
    assert features(images[:, :1])[1, :3].tolist() == [55.5] * 3
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] or \[N, 1, H, W\]"):
        features(images.float())
