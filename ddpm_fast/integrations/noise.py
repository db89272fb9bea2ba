"""Where the noise of an accelerated pipeline comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..loss import processes
from ..ops.checks import as_int, check_ids_on_host, noise_address
from ..schedule import one_of

Source = Literal["addressed", "torch"]
Address = tuple[int, Tensor | None]  # seed, sample ids


@dataclass(frozen=True)
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

    Only the count changes: ``set_noise`` of what has a source gives it another one.

    Raises:
        TypeError, ValueError: an unknown source, a seed or ids out of range, either of them for
            torch's.
    """

    source: Source = "addressed"
    seed: int | None = None
    sample_ids: Tensor | Sequence[int] | None = field(default=None, compare=False)
    consumed: int = 0

    def __post_init__(self) -> None:
        one_of("noise", self.source, Source)
        if self.seed is not None:
            object.__setattr__(self, "seed", as_int("seed", self.seed, 1 << 64))
        if self.sample_ids is not None:
            object.__setattr__(self, "sample_ids", _checked(self.sample_ids))
        object.__setattr__(self, "consumed", as_int("consumed", self.consumed, 1 << 63))
        if not self.is_addressed and (self.seed is not None or self.sample_ids is not None):
            raise ValueError("seed and sample_ids belong to noise='addressed'")

    @property
    def is_addressed(self) -> bool:
        return self.source == "addressed"

    def of_trajectory(self, device: torch.device) -> Address:
        """What all the draws of one run share, the ids on ``device``; the same at each call where
        there is a seed."""
        ids = self.sample_ids
        assert ids is None or isinstance(ids, Tensor)
        seed = fresh_seed() if self.seed is None else self.seed
        return seed, None if ids is None else ids.to(device)

    def of_training(self, samples: int, device: torch.device) -> Address:
        """The address of the next ``samples`` samples to train on. Each process of a group has ids
        of its own, every n-th of n processes, whatever the others' batches are."""
        rank, count = processes()
        if self.seed is None and count == 1:
            return fresh_seed(), None
        first = self.consumed + rank
        ids = torch.arange(first, first + samples * count, count, device=device)
        if self.seed is None:  # the processes may have been seeded alike
            return fresh_seed(), ids
        object.__setattr__(self, "consumed", self.consumed + count * samples)
        return self.seed, ids


def fresh_seed() -> int:
    """63 bits of torch's default CPU generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _checked(sample_ids: Tensor | Sequence[int]) -> Tensor:
    """int64 [N], where the ids lie; a list's on the CPU."""
    if isinstance(sample_ids, Tensor):
        samples, device = sample_ids.numel(), sample_ids.device
    elif isinstance(sample_ids, (str, bytes)) or not isinstance(sample_ids, Sequence):
        raise TypeError(f"sample_ids must be integers, one a sample; got {sample_ids!r}")
    else:
        samples, device = len(sample_ids), torch.device("cpu")
    with torch.inference_mode(False):
        _, _, ids = noise_address(0, sample_ids, samples, device)
        check_ids_on_host(ids)
        assert ids is not None
        return ids.clone()  # what the caller does with theirs is no matter here
