"""Which timesteps a training batch gets and what they weigh.

Uniform and antithetic ones are functions of (seed, sample id) in :mod:`reference`. Importance
sampling by the losses' second moment is that of Nichol & Dhariwal 2021, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

LABEL_DROP_STREAM = 7

# Of seeds, sample ids and the group size: one tensor or two, a value a sample.
Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


class ConsecutiveIds:
    """Draws for ids that follow each other, made for many calls at a time.

    Plain PyTorch takes a hundred small operations to draw a word, for one id as for a thousand.
    """

    AHEAD = 64  # calls

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._key: tuple[int, int, torch.device] | None = None
        self._first, self._held = 0, 0
        self._values: tuple[Tensor | None, ...] = ()

    def __call__(
        self, seed: int, first: int, count: int, group_size: int, device: torch.device
    ) -> tuple[Tensor | None, ...]:
        """Views of the ids first … first + count − 1 and of what is drawn for them."""
        key = (seed, group_size, device)
        begin = first - self._first
        if key != self._key or begin < 0 or begin + count > self._held:
            # A run goes forward; whoever jumps about pays for what is asked alone.
            forward = key == self._key and begin >= 0
            self._fill(seed, first, count * (self.AHEAD if forward else 1), group_size, device)
            self._key, begin = key, 0
        return tuple(v if v is None else v.narrow(0, begin, count) for v in self._values)

    def _fill(
        self, seed: int, first: int, count: int, group_size: int, device: torch.device
    ) -> None:
        ids = torch.arange(count, device=device) + first  # past 2^63 they wrap, unseen
        seeds = torch.full((count,), seed, dtype=torch.int64, device=device)
        self._values = (ids, *self._draw(seeds, ids, group_size))
        self._first, self._held = first, count


class LossSecondMoment:
    """Timesteps drawn in proportion to √E[L_t²] over the last ten losses of each.

    Until every timestep has ten, and where all losses are 0, they are drawn uniformly. A thousandth
    of the probability is always uniform.

    Attributes:
        history: float64 [T + 1, 10], rings; the last row takes what is not kept.
        counts: int64 [T + 1], how many losses each ring was given.
    """

    KEPT = 10
    UNIFORM = 0.001

    def __init__(self, num_steps: int) -> None:
        self.history = torch.zeros(num_steps + 1, self.KEPT, dtype=torch.float64)
        self.counts = torch.zeros(num_steps + 1, dtype=torch.int64)

    @torch.inference_mode(False)  # it will be updated in place
    def to(self, device: torch.device) -> LossSecondMoment:
        if self.history.device != device:
            self.history, self.counts = self.history.to(device), self.counts.to(device)
        return self

    def probabilities(self) -> Tensor:
        """p of each timestep, float64 [T]."""
        moments = self.history[:-1].square().mean(1).sqrt()
        total, share = moments.sum(), 1 / len(moments)
        ready = (self.counts[:-1] >= self.KEPT).all() & (total > 0)
        return torch.where(
            ready, moments / total * (1 - self.UNIFORM) + self.UNIFORM * share, share
        )

    def draw(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps by the inverse of the cumulative distribution at (w₀ + ½) 2^-32, int64 [N], and
        their importance weights 1/(T p), float32 [N]."""
        p = self.probabilities()
        cumulative = p.cumsum(0)
        u = (words.double() + 0.5) * 2.0**-32 * cumulative[-1]
        t = torch.searchsorted(cumulative, u, right=True)  # u is below the last
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor, group_size: int | None) -> None:
        """Takes a batch's losses into the history, those of all processes in the order of their
        ranks. Losses that are not finite are left out."""
        t, losses = _of_all_processes(t, losses.detach().double(), group_size)
        nowhere = len(self.counts) - 1
        t = torch.where((t >= 0) & losses.isfinite(), t, nowhere)
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order]
        place = torch.arange(len(t), device=t.device)
        first = torch.searchsorted(t, t)
        left = torch.searchsorted(t, t, right=True) - place  # itself and later ones of its timestep
        row = torch.where(left <= self.KEPT, t, nowhere)
        self.history[row, (self.counts[t] + place - first) % self.KEPT] = losses
        self.counts.scatter_add_(0, t, torch.ones_like(t))


class TimestepWeights:
    """One weight for all timesteps, or float64 [T] of them, over a power of two."""

    def __init__(self, weights: Tensor | float) -> None:
        if isinstance(weights, Tensor) and not bool(weights.isfinite().all()):
            step = int((~weights.isfinite()).nonzero()[0])
            raise ValueError(f"the weight of timestep {step} is not finite: take p2_k above 0")
        self._weights = weights
        self._made: dict[tuple[torch.device, int], Tensor] = {}

    def of(self, t: Tensor, scale: float) -> Tensor:
        """float32 [N]."""
        key = (t.device, len(t))
        table = self._made.get(key)
        if table is None:
            if isinstance(self._weights, Tensor):
                table = (self._weights / scale).float().to(t.device)
            else:
                table = torch.full((len(t),), self._weights / scale, device=t.device)
            if len(self._made) >= 16:
                self._made.clear()
            self._made[key] = table
        return table.index_select(0, t) if isinstance(self._weights, Tensor) else table


def _of_all_processes(t: Tensor, losses: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The pairs of all processes in the order of their ranks, padded with t = −1.

    width: at least the number of pairs of any process; found by an exchange that waits for the
    device if None.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return t, losses
    world = dist.get_world_size()
    if width is None:
        size = torch.tensor([len(t)], device=t.device)
        sizes = [torch.empty_like(size) for _ in range(world)]
        dist.all_gather(sizes, size)
        width = max(int(size) for size in sizes)
    if len(t) > width:
        raise ValueError(
            f"group_size must be at least the {len(t)} samples of this process; got {width}"
        )
    pairs = losses.new_full((width, 2), -1.0)
    pairs[: len(t), 0], pairs[: len(t), 1] = t.double(), losses
    everyones = [torch.empty_like(pairs) for _ in range(world)]
    dist.all_gather(everyones, pairs)
    together = torch.cat(everyones)
    return together[:, 0].long(), together[:, 1]
