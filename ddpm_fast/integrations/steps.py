"""A sampler of another library as rows of a table for reverse_step, one for each timestep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import reverse_step
from ..ops.checks import (
    FLOAT_DTYPES,
    MAX_ELEMENTS,
    check_same_shape,
    noise_address,
    runs_now,
)
from ..ops.reverse_step import _reverse_step as reverse_step_now
from ..ops.reverse_step import check_clip
from ..ops.reverse_step_run import VARIANCES, formula
from ..schedule import Method, Prediction, Variance
from ..step_table import StepTable
from .noise import Address


@dataclass(frozen=True, eq=False)
class Steps:
    """The rows of all timesteps; the row of timestep t is T − 1 − t.

    Attributes:
        table: float32, for the kernels.
        rows: float64, for states in float64, which take the formula of ``reference``.
    """

    table: StepTable
    rows: Tensor
    _rows_by_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)
    _by_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _variance: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_variance", VARIANCES.index(self.table.model_variance))

    @classmethod
    @torch.inference_mode(False)
    def of(
        cls,
        *,
        r: Tensor,
        c_x: Tensor,
        c_m: Tensor,
        b_0: Tensor,
        b_x: Tensor,
        b_m: Tensor,
        sigma: Tensor,
        log_variance_min: Tensor | None = None,
        log_variance_max: Tensor | None = None,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        method: Method = "ddpm",
    ) -> Steps:
        """The columns of StepTable, each [T] by ascending timestep, or one number for all, in the
        dtype in which they were computed."""
        none = torch.zeros(1)
        columns = (r, c_x, c_m, b_0, b_x, b_m, sigma)
        bounds = (
            none if log_variance_min is None else log_variance_min,
            none if log_variance_max is None else log_variance_max,
        )
        doubled = [column.detach().to("cpu", torch.float64) for column in (*columns, *bounds)]
        rows = torch.stack(torch.broadcast_tensors(*doubled), 1).flip(0).contiguous()
        timesteps = torch.arange(len(rows) - 1, -1, -1, device="cpu")
        return cls(StepTable(rows.float(), timesteps, prediction, variance, method), rows)

    def __len__(self) -> int:
        return len(self.table)

    def take(
        self,
        x: Tensor,
        model_output: Tensor,
        t: int | Tensor,
        address: Address,
        *,
        clip: tuple[float, float] | None,
        noise: Tensor | None = None,
        x0: Tensor | None = None,
        return_x0: bool = True,
    ) -> tuple[Tensor, Any]:
        """One step from timestep t, an int or int64 [N]: x′ and x̂₀ of the dtype that x and the
        model's output promote to, or None for x̂₀ where it is not wanted. The other arguments are
        reverse_step's."""
        dtype = x.dtype
        if model_output.dtype is not dtype:
            dtype = torch.promote_types(dtype, model_output.dtype)
            x = x.to(dtype)
        if dtype is torch.float64:
            row = len(self) - 1 - t
            return self._in_float64(x, model_output, row, address, clip, noise, x0)
        if not self._is_plain(x, model_output, noise, x0):
            seed, ids = address
            row = len(self) - 1 - t
            step: Any = reverse_step(
                x, model_output, self.table, row, seed=seed, sample_ids=ids, clip=clip,
                noise=noise, x0=x0, return_x0=return_x0,
            )  # fmt: skip
            return (step[0], step[1].to(dtype)) if return_x0 else (step, None)
        seed, ids = address
        if ids is not None or not 0 <= seed < 1 << 63:
            seed, _, ids = noise_address(seed, ids, x.shape[0], x.device)
        lo, hi = check_clip(clip)
        rows, timesteps = self._rising(x.device)
        at, ts = (t, None) if type(t) is int else (0, t)
        x_next, x0_hat = reverse_step_now(
            x, model_output, rows, timesteps, at, ts, seed, None, ids, self._variance, lo, hi,
            None, 1.0, None, noise, x0, return_x0,
        )  # fmt: skip
        if not return_x0:
            return x_next, None
        return x_next, x0_hat if x0_hat.dtype is dtype else x0_hat.to(dtype)

    def _is_plain(self, x: Tensor, m: Tensor, noise: Tensor | None, x0: Tensor | None) -> bool:
        """Whether these are what reverse_step would let pass, with nothing that traces or
        differentiates: its checks take as long as a small step."""
        shape = x.shape
        if self._variance:
            fits = m.ndim == x.ndim > 1 and m.shape[1] == 2 * shape[1]
            fits = fits and m.shape[0] == shape[0] and m.shape[2:] == shape[2:]
        else:
            fits = m.shape == shape and len(shape) > 0
        return (
            fits
            and x.dtype in FLOAT_DTYPES
            and m.dtype in FLOAT_DTYPES
            and m.device == x.device
            and (noise is None or _is_like(noise, x))
            and (x0 is None or _is_like(x0, x))
            and x.numel() < MAX_ELEMENTS
            and runs_now(x, m, noise, x0)
        )

    def _rising(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows in float32 and their timesteps by ascending timestep: a timestep is its row."""
        found = self._by_device.get(device)
        if found is None:
            with torch.inference_mode(False):
                rows = self.table.rows.flip(0).contiguous().to(device)
                found = rows, torch.arange(len(self), device=device)
            self._by_device[device] = found
        return found

    def _in_float64(
        self,
        x: Tensor,
        model_output: Tensor,
        row: int | Tensor,
        address: Address,
        clip: tuple[float, float] | None,
        noise: Tensor | None,
        x0: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        device = x.device
        seed, _, ids = noise_address(*address, x.shape[0], device)
        rows = self._rows_by_device.get(device)
        if rows is None:
            rows = self._rows_by_device.setdefault(device, self.rows.to(device))
        halves = 1 if self.table.model_variance == "none" else 2
        check_same_shape(
            "model_output", model_output, (x.shape[0], halves * x.shape[1], *x.shape[2:])
        )
        return formula(
            x.double(),
            model_output.double(),
            rows,
            self.table.to(device).timesteps,
            row if isinstance(row, int) else 0,
            None if isinstance(row, int) else row,
            (seed, None, ids),
            self.table.model_variance,
            check_clip(clip),
            None,
            torch.ones((), device=device),
            None if noise is None else noise.double(),
            None if x0 is None else x0.double(),
        )


def _is_like(tensor: Tensor, x: Tensor) -> bool:
    return tensor.shape == x.shape and tensor.dtype in FLOAT_DTYPES and tensor.device == x.device
