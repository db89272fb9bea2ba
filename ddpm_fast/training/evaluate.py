"""How good a trained model is: bits/dim of a data set, and the Fréchet distance of its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..likelihood import bits_per_dim
from ..progress import bar
from .checkpoints import LoadedModel
from .data import ImageData, Loader
from .draw import DTYPES, Artist, Precision
from .frechet import FeatureExtractor, Moments


class _Batches:
    """Images, or pairs of images and labels, of a data set in random order, each once."""

    def __init__(self, data: ImageData, num: int, batch_size: int, seed: int, labels: bool) -> None:
        starts = range(0, num, batch_size)
        self._positions = [range(start, min(start + batch_size, num)) for start in starts]
        self._data, self._seed, self._labels = data, seed, labels

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Any]:
        with Loader(self._data, self._positions, seed=self._seed) as loader:
            for batch in loader:
                yield (batch.images, batch.labels) if self._labels else batch.images


def number_of_images(data: ImageData, num: int | None, at_least: int = 1) -> int:
    """How many of the data set's images to take; all if None.

    Raises:
        ValueError: more than there are, or too few.
    """
    num = len(data) if num is None else num
    if not at_least <= num <= len(data):
        raise ValueError(
            f"num must lie in {at_least} … {len(data)}, the images there are; got {num}"
        )
    return num


def evaluate_bits_per_dim(
    loaded: LoadedModel,
    data: ImageData,
    *,
    num: int | None = None,
    num_timesteps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    progress: bool = False,
) -> dict[str, Any]:
    """The variational bound on the data's negative log-likelihood, in bits/dim.

    Args:
        loaded: the model; it is moved to ``device`` and brought to ``precision``.
        data: with labels in the model's range, if the model has classes.
        num: of images, a random choice; all if None.
        num_timesteps: to evaluate of each image, 3 … T; all if None.
        seed: of the choice, the noise and the timesteps.

    Returns:
        mean: over the images; standard_error: of the mean for the population they come from, what
        is due to leaving out timesteps included; standard_error_of_timesteps: the latter's part;
        prior, kl, decoder: the parts, whose sum is the mean; images, timesteps.

    Raises:
        ValueError: an argument out of its range.
        FloatingPointError: a bound that is not finite.
    """
    num = number_of_images(data, num)
    model, loss = loaded.model, loaded.config.loss
    model.eval().to(device=device, dtype=DTYPES[precision])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = loaded.config.build_schedule()
    bits = bits_per_dim(
        model,
        _Batches(data, num, batch_size, seed, labels=model.config.num_classes is not None),
        schedule,
        prediction=loss.prediction,
        variance=loss.variance,
        seed=seed,
        num_timesteps=num_timesteps,
        progress=progress,
    )
    prior, decoder = float(bits.prior.double().mean()), float(bits.vlb[:, 0].double().mean())
    if not math.isfinite(bits.mean):
        raise FloatingPointError("the bound is not finite: the model gives NaN or infinities")
    return {
        "mean": bits.mean,
        "standard_error": bits.mean_sample_error if num > 1 else None,
        "standard_error_of_timesteps": bits.mean_timestep_error,
        "prior": prior,
        "kl": bits.mean - prior - decoder,
        "decoder": decoder,
        "images": num,
        "timesteps": len(schedule) if num_timesteps is None else num_timesteps,
    }


def evaluate_frechet(
    artist: Artist,
    data: ImageData,
    features: FeatureExtractor,
    *,
    num: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """The Fréchet distance between the data's features and those of samples.

    The samples' classes are those of the data's images, in random order.

    Args:
        artist: draws the samples 0 … num_samples − 1.
        data: with labels in the model's range, if the model has classes.
        features: uint8 [N, C, H, W] → [N, D].
        num: of the data's images, a random choice; all if None.
        num_samples: by default as many as images.

    Returns:
        distance: at least 0; it falls as the numbers grow, so compare at the same ones; features:
        their name; dimensions, images, samples.

    Raises:
        ValueError: an argument out of its range; images that the features are not for.
        FloatingPointError: the model gave NaN.
    """
    num = number_of_images(data, num, at_least=2)
    num_samples = num if num_samples is None else num_samples
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2; got {num_samples}")
    follow = artist.num_classes is not None and artist.config.class_label is None
    if follow and data.class_names is None:
        raise ValueError("the model has classes and the data has no labels")
    real, drawn = Moments(), Moments()
    labels: list[Tensor] = []
    for batch in _Batches(data, num, batch_size, artist.config.seed, labels=follow):
        images = batch if isinstance(batch, Tensor) else batch[0]
        real.update(features(images))
        if follow:
            labels.append(batch[1])
    classes = torch.cat(labels)[torch.arange(num_samples) % num] if follow else None
    with bar(progress, num_samples, "drawing") as shown_bar:
        for first in range(0, num_samples, batch_size):
            ids = range(first, min(first + batch_size, num_samples))
            chosen = None if classes is None else classes[first : ids.stop]
            drawn.update(features(artist.images(ids, chosen)))
            shown_bar.update(len(ids))
    return {
        "distance": real.distance(drawn),
        "features": features.name,
        "dimensions": len(real.mean),
        "images": num,
        "samples": num_samples,
    }
