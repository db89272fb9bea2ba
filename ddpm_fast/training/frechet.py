"""The Fréchet distance between two sets of images, by the Gaussians that their features fit.

d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

[Dowson & Landau 1982, eq. 4; Heusel et al. 2017, eq. 6].

FID is this distance between the Inception features of 50,000 samples and of the training set.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


class FeatureExtractor(Protocol):
    """What turns images into features: anything that can be called so.

    uint8 [N, C, H, W] → floating point [N, D], tensor or array.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor | np.ndarray[Any, Any]:
        """The features of a batch."""


class Moments:
    """Mean and covariance of vectors that come in batches, in float64.

    Batches are merged by the formulas of Chan, Golub & LeVeque 1983: no difference of large sums is
    taken, and any split into batches gives the same to rounding.

    >>> moments = Moments()
    >>> moments.update([[0.0, 1.0], [2.0, 1.0]])
    >>> moments.update([[4.0, 4.0]])
    >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
    (3, [2.0, 2.0], [[4.0, 3.0], [3.0, 3.0]])
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Array = np.zeros(0)
        self._scatter: Array = np.zeros((0, 0))

    def update(self, features: Any) -> None:
        """Takes in [N, D] more.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or (self.count and x.shape[1] != len(self._mean)):
            width = len(self._mean) if self.count else "D"
            raise ValueError(f"features must be [N, {width}]; got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise ValueError("features must be finite; got NaN or infinities")
        if len(x):
            other = Moments()
            other.count, other._mean = len(x), x.mean(0)
            centred = x - other._mean
            other._scatter = centred.T @ centred
            self.merge(other)

    def merge(self, other: Moments) -> None:
        """Takes in what ``other`` has seen."""
        if not self.count:
            self.count, self._mean = other.count, other._mean.copy()
            self._scatter = other._scatter.copy()
        elif other.count:
            total = self.count + other.count
            apart = other._mean - self._mean
            weight = self.count * other.count / total
            self._scatter += other._scatter + weight * np.outer(apart, apart)
            self._mean = self._mean + apart * (other.count / total)
            self.count = total

    @property
    def mean(self) -> Array:
        """[D]."""
        return self._mean

    @property
    def covariance(self) -> Array:
        """[D, D], the sum of squares divided by N − 1.

        Raises:
            ValueError: fewer than two vectors have come.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors; there are {self.count}")
        return self._scatter / (self.count - 1)

    def distance(self, other: Moments) -> float:
        """:func:`frechet_distance` from ``other``."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(mean1: Any, covariance1: Any, mean2: Any, covariance2: Any) -> float:
    """d² between N(mean1, covariance1) and N(mean2, covariance2), in float64.

    With Σᵢ = Aᵢ Aᵢᵀ, tr (Σ₁ Σ₂)^½ is the sum of the singular values of A₁ᵀ A₂, the roots of the
    eigenvalues of Σ₁^½ Σ₂ Σ₁^½. Taken from A₁ᵀ A₂ itself they need no root of a number that
    rounding may have made negative, and what is rounding in a singular Σᵢ is taken for 0.

    Args:
        mean1, mean2: [D].
        covariance1, covariance2: [D, D], symmetric and positive semi-definite.

    Returns:
        At least 0.

    Raises:
        ValueError: other shapes, values that are not finite, a covariance that is not one.

    >>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])  # 3² + (2 − 1)²
    10.0
    """
    mu1, mu2 = (np.asarray(mean, dtype=np.float64) for mean in (mean1, mean2))
    sigma1, sigma2 = (np.asarray(c, dtype=np.float64) for c in (covariance1, covariance2))
    for name, mu, sigma in (("1", mu1, sigma1), ("2", mu2, sigma2)):
        if mu.shape != mu1.shape or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(
                f"mean{name} must be [D] and covariance{name} [D, D], D as in mean1; got "
                f"{list(mu.shape)} and {list(sigma.shape)}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mean{name} and covariance{name} must be finite")
    a1, a2 = _factor("covariance1", sigma1), _factor("covariance2", sigma2)
    overlap = np.linalg.svd(a1.T @ a2, compute_uv=False).sum()
    apart = mu1 - mu2
    squared = float(apart @ apart + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)
    return max(squared, 0.0)


def _factor(name: str, sigma: Array) -> Array:
    """A of Σ = A Aᵀ."""
    scale = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-8 * scale:
        raise ValueError(f"{name} must be symmetric")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values.min(initial=0.0) < -1e-8 * scale * len(sigma):
        raise ValueError(f"{name} must have no negative eigenvalue; got {values.min():g}")
    rounding = len(sigma) * np.finfo(np.float64).eps * values.max(initial=0.0)
    return vectors * np.sqrt(np.where(values > rounding, values, 0.0))


class DigitsFeatures:
    """32 features of an 8×8 digit: the last hidden layer of a small classifier.

    Two hidden layers, fitted to the training digits with a fixed seed and on one thread.
    """

    name = "digits"

    def __init__(self) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits

        from .digits import load_digits

        digits = load_digits()
        self.classifier = MLPClassifier((64, 32), max_iter=60, random_state=0, tol=0.0)
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is stopped early
            self.classifier.fit(_levels(digits.train_images), digits.train_labels.numpy())

    def __call__(self, images: Tensor) -> Array:
        """float64 [N, 32] of uint8 [N, 1, 8, 8].

        Raises:
            ValueError: images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 8, 8):
            raise ValueError(
                "digits features are of uint8 [N, 1, 8, 8] images; got "
                f"{images.dtype} {list(images.shape)}"
            )
        h = _levels(images)
        for weights, bias in zip(
            self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True
        ):
            h = np.maximum(h @ weights + bias, 0.0)
        return h


def _levels(images: Tensor) -> Array:
    return images.flatten(1).cpu().numpy() / 255.0


class InceptionFeatures:
    """The 2048 features of FID, by torch-fidelity's Inception network.

    Args:
        device: where it runs.
        weights: path of its weights; by default torch-fidelity downloads them.

    Raises:
        ImportError: torch-fidelity is not installed.
    """

    name = "inception"

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"Inception features need torch-fidelity ({error}): pip install torch-fidelity"
            ) from error
        self.device = torch.device(device)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
        )
        self._network = network.to(self.device).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [N, 2048] of uint8 [N, 3, H, W], or of grey images [N, 1, H, W].

        Raises:
            ValueError: images of another dtype or number of channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "Inception features are of uint8 [N, 3, H, W] or [N, 1, H, W] images; got "
                f"{images.dtype} {list(images.shape)}"
            )
        with torch.inference_mode():
            features = self._network(images.expand(-1, 3, -1, -1).contiguous().to(self.device))[0]
        return features.cpu()
