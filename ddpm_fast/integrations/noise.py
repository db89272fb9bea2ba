"""Where the noise of an accelerated pipeline comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..loss import processes
from ..ops.checks import as_int
from ..schedule import one_of

Source = Literal["addressed", "torch"]
Address = tuple[int, Tensor | Sequence[int] | None]  # seed, sample ids


@dataclass
class NoiseSource:
    """Addressed noise, drawn in the kernels, or the numbers of torch's generators.

    Attributes:
        source: "addressed": a function of (seed, sample id, draw, element). "torch": drawn with
            torch.randn in the order in which the stock code draws, so that ``torch.manual_seed``
            gives what it gave before.
        seed: in [0, 2^64). None: a new one for every trajectory and every training step, from
            torch's default CPU generator, so that repeated calls differ.
        sample_ids: of the samples of a trajectory; 0 … N−1 if None.
        consumed: how many samples training has taken from ``seed``: the id of the next one, so that
            no two share their noise. Counted only where there is a seed.

    Raises:
        TypeError, ValueError: an unknown source, a seed out of range, ids or a seed for torch's.
    """

    source: Source = "addressed"
    seed: int | None = None
    sample_ids: Tensor | Sequence[int] | None = None
    consumed: int = 0

    def __post_init__(self) -> None:
        one_of("noise", self.source, Source)
        if self.seed is not None:
            self.seed = as_int("seed", self.seed, 1 << 64)
        self.consumed = as_int("consumed", self.consumed, 1 << 63)
        if not self.is_addressed and (self.seed is not None or self.sample_ids is not None):
            raise ValueError("seed and sample_ids belong to noise='addressed'")

    @property
    def is_addressed(self) -> bool:
        return self.source == "addressed"

    def of_trajectory(self) -> Address:
        """What all the draws of one run share; the same at each call where there is a seed."""
        return fresh_seed() if self.seed is None else self.seed, self.sample_ids

    def of_training(self, samples: int, device: torch.device) -> Address:
        """The address of the next ``samples`` samples to train on. Each process of a group has ids
        of its own: they are taken to train on as many samples."""
        rank, count = processes()
        if self.seed is None and count == 1:
            return fresh_seed(), None
        first = self.consumed + rank * samples
        ids = torch.arange(first, first + samples, device=device)
        if self.seed is None:  # the processes may have been seeded alike
            return fresh_seed(), ids
        self.consumed += count * samples
        return self.seed, ids


def fresh_seed() -> int:
    """63 bits of torch's default CPU generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
