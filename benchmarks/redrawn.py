"""The noise that a pipeline drew, drawn again: with it the stock code has to say the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ddpm_fast import randn, use_backend

# What the draws of each kind are addressed by, besides: docs/noise.md.
REVERSE, FORWARD, LIKELIHOOD = 1, 2, 4


def seeded() -> int:
    """Sets torch's seed; the seed that a pipeline without one of its own takes from it first."""
    torch.manual_seed(0)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(0)
    return seed


def redrawn(like: Tensor, seed: int, stream: int, index: int | Tensor = 0) -> Tensor:
    """By the specification, on the host, and in float32 whatever the pipeline's dtype is."""
    index = index.cpu() if isinstance(index, Tensor) else index
    with torch.inference_mode(False), use_backend("reference"):
        z = randn(like.shape, seed=seed, stream=stream, index=index)
        return z.to(like.device, like.dtype)


@contextlib.contextmanager
def drawing(name: str, noises: Iterable[Tensor]) -> Iterator[None]:
    """The function of that name ("torch.randn_like", …) gives these, one a call."""
    left = iter(noises)

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        return next(left)

    with mock.patch(name, draw):
        yield
