"""Exponential moving averages of the weights, at several rates at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .sharding import local


class Averages:
    """a ← d a + (1 − d) θ after each step, d = min(rate, (1 + t)/(10 + t)), t = 0, 1, ….

    The warm-up lets the first weights go; Ho et al. 2020 average at rate 0.9999.

    Args:
        parameters: θ, which the averages begin with.
        rates: one average each.

    Attributes:
        shadows: of each rate, tensors like the parameters.

    >>> averages = Averages([torch.zeros(1)], [0.999])
    >>> averages.update([torch.ones(1)], t=0)
    >>> averages.shadows[0.999]
    [tensor([0.9000])]
    """

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[float]) -> None:
        with torch.no_grad():
            self.shadows = {rate: [p.detach().clone() for p in parameters] for rate in rates}
            self._locals = {rate: [local(a) for a in ours] for rate, ours in self.shadows.items()}

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], t: int) -> None:
        """Takes the weights in after ``t`` updates before."""
        weights = [local(p) for p in parameters]
        for rate, shadows in self._locals.items():
            torch._foreach_lerp_(shadows, weights, 1 - min(rate, (1 + t) / (10 + t)))

    @contextlib.contextmanager
    def swapped_in(self, parameters: Sequence[Tensor], rate: float) -> Iterator[None]:
        """The average in the parameters' place; afterwards the parameters have their bits back."""
        weights = [local(p.detach()) for p in parameters]
        with torch.no_grad():
            kept = [w.clone() for w in weights]
            torch._foreach_copy_(weights, self._locals[rate])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)
