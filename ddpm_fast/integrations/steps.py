"""A sampler of another library as rows of a table for reverse_step, one for each timestep."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import reverse_step
from ..ops.checks import check_same_shape, noise_address
from ..ops.reverse_step import check_clip
from ..ops.reverse_step_run import formula
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
    ) -> tuple[Tensor, Tensor]:
        """One step from timestep t, an int or int64 [N]: x′ and x̂₀ of the dtype that x and the
        model's output promote to. The other arguments are reverse_step's."""
        seed, sample_ids = address
        row = len(self.table) - 1 - t
        dtype = torch.promote_types(x.dtype, model_output.dtype)
        if dtype == torch.float64:
            return self._in_float64(x, model_output, row, address, clip, noise, x0)
        result = reverse_step(
            x.to(dtype),
            model_output,
            self.table,
            row,
            seed=seed,
            sample_ids=sample_ids,
            clip=clip,
            noise=noise,
            x0=x0,
            return_x0=True,
        )
        x_next, x0_hat = result
        return x_next, x0_hat.to(dtype)

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
