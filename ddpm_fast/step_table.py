"""What a sampler is to the kernels: one row of nine float32 numbers a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Method = Literal["ddpm", "ddim"]
# In the order of Variance in csrc/core/reverse_step.h.
ModelVariance = Literal["none", "ignored", "learned", "learned_range"]

# A noise index has 24 bits, and a step's noise index is its timestep.
MAX_NUM_STEPS = 1 << 24


@dataclass(frozen=True, eq=False)
class StepTable:
    """A trajectory as the kernels take it. Row 0 is the first step taken.

    Attributes:
        rows: float32 [S, 9]: r, c_x, c_m, b_0, b_x, b_m, sigma, log_var_min, log_var_max, of
            ``x0_hat = clip(r (c_m m + c_x x))`` and ``x' = b_0 x0_hat + b_x x + b_m m + sigma z``.
        timesteps: int64 [S], strictly decreasing, but from one trajectory to the next of
            :func:`joined`: each row's timestep and the index of its noise.
        prediction: what the model's output m is.
        variance: where sigma comes from.
        method: "ddpm" or "ddim".
        lengths: of the trajectories that follow each other in it; of its only one if empty.
    """

    rows: Tensor
    timesteps: Tensor
    prediction: Prediction
    variance: Variance
    method: Method
    lengths: tuple[int, ...] = ()
    _by_device: dict[torch.device, StepTable] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rows, timesteps = self.rows, self.timesteps
        if rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != 9 or len(rows) == 0:
            raise ValueError(f"rows must be float32 [S, 9]; got {rows.dtype} {list(rows.shape)}")
        if timesteps.dtype != torch.int64 or timesteps.shape != rows.shape[:1]:
            raise ValueError(
                f"timesteps must be int64 [{len(rows)}]; got {timesteps.dtype} "
                f"{list(timesteps.shape)}"
            )
        if not rows.is_contiguous() or not timesteps.is_contiguous():
            raise ValueError("rows and timesteps must be contiguous")
        if rows.device.type == "cpu":
            parts = timesteps.split(list(self.lengths or (len(rows),)))
            if not all(bool((part.diff() < 0).all()) for part in parts):
                raise ValueError("timesteps must strictly decrease")
            if timesteps.min() < 0 or timesteps.max() >= MAX_NUM_STEPS:
                raise ValueError("timesteps must lie in 0 … 2^24 - 1")

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def model_variance(self) -> ModelVariance:
        """What the second half of the model's channels means: "none" where there is none."""
        if self.variance == "fixed_small" or self.variance == "fixed_large":
            return "none"
        return self.variance if self.method == "ddpm" else "ignored"

    def to(self, device: torch.device | str) -> StepTable:
        """The same table on ``device``, copied there once."""
        if device == self.rows.device:
            return self
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.rows.device:
            return self
        found = self._by_device.get(device)
        if found is None:
            with torch.inference_mode(False):
                rows, timesteps = self.rows.to(device), self.timesteps.to(device)
            found = replace(self, rows=rows, timesteps=timesteps, _by_device={})
            if type(rows) is Tensor:  # not what stands for one while a function is traced
                self._by_device[device] = found
        return found


def joined(tables: Sequence[StepTable]) -> StepTable:
    """The rows of trajectories of one kind, one after another: row i of a table is row i + the
    lengths of those before it. No trajectory itself, but samples of all of them may share a step.

    Raises:
        ValueError: trajectories of different predictions, variances or methods, or none.
    """
    kinds = {(table.prediction, table.variance, table.method) for table in tables}
    if len(kinds) != 1:
        raise ValueError(f"tables must be of one prediction, variance and method; got {kinds}")
    return replace(
        tables[0],
        rows=torch.cat([table.rows for table in tables]),
        timesteps=torch.cat([table.timesteps for table in tables]),
        lengths=tuple(map(len, tables)),
        _by_device={},
    )
