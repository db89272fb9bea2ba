"""A sampler of another library as rows of a table for reverse_step, one for each timestep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import randn, reverse_step
from ..ops.checks import (
    FLOAT_DTYPES,
    MAX_ELEMENTS,
    as_int,
    check_range_on_host,
    check_same_shape,
    is_transformed,
    noise_address,
    per_sample_int,
    runs_now,
)
from ..ops.reverse_step import NO_CLIP, check_clip
from ..ops.reverse_step import _reverse_step as reverse_step_now
from ..ops.reverse_step_run import STREAM, VARIANCES
from ..schedule import Method, Prediction, Variance
from ..step_table import StepTable
from .noise import Address


@dataclass(frozen=True, eq=False)
class Steps:
    """The rows of all timesteps; the row of timestep t is T − 1 − t.

    Attributes:
        table: float32, for the kernels.
        rows: float64, for states in float64 and steps to differentiate.
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
        compiling = torch.compiler.is_compiling()
        if dtype is torch.float64 or (not compiling and is_transformed(x, model_output, x0)):
            return self._by_formula(x, model_output, t, address, clip, noise, x0, dtype)
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
        at, ts = t, None
        if isinstance(t, Tensor):
            at, ts = 0, self._checked(t, x)
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

    def _by_formula(
        self,
        x: Tensor,
        model_output: Tensor,
        t: int | Tensor,
        address: Address,
        clip: tuple[float, float] | None,
        noise: Tensor | None,
        x0: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """In plain PyTorch: float64, and steps to differentiate, as often as one likes, where the
        op's own backward takes longer."""
        work = torch.float64 if dtype is torch.float64 else torch.float32
        halves = 2 if self._variance else 1
        shape = (x.shape[0], halves * x.shape[1], *x.shape[2:])
        check_same_shape("model_output", model_output, shape)
        x, m = x.to(work), model_output.to(work)
        r, c_x, c_m, b_0, b_x, b_m, sigma, log_min, log_max = self._numbers(t, x)
        mean, v = m.chunk(2, 1) if self._variance else (m, None)
        if x0 is None:
            x0 = mean if _is(r, 1) and _is(c_x, 0) and _is(c_m, 1) else r * (c_x * x + c_m * mean)
        lo, hi = check_clip(clip)
        x0_hat = x0.to(work) if (lo, hi) == NO_CLIP else x0.to(work).clamp(lo, hi)
        x_next = b_0 * x0_hat + b_x * x
        if not _is(b_m, 0):
            x_next = x_next + b_m * mean
        if not _is(sigma, 0):
            if noise is None:
                seed, ids = address
                noise = randn(
                    x.shape, seed=seed, sample_ids=ids, stream=STREAM, index=t, device=x.device
                )
            term = sigma * noise.to(work)
            if v is not None and self.table.model_variance != "ignored":
                if self.table.model_variance == "learned_range":
                    v = (0.5 * (log_max - log_min)) * (v + 1) + log_min
                term = term * (0.5 * v).clamp(-87, 87).exp()
            if isinstance(sigma, Tensor):
                term = torch.where(sigma == 0, torch.zeros_like(term), term)
            x_next = x_next + term
        return x_next.to(dtype), x0_hat.to(dtype)

    def _checked(self, t: Tensor, x: Tensor) -> Tensor:
        """Timesteps as the kernel reads them."""
        per_sample_int("t", t, x.shape[0], x.device)
        t = t.contiguous()
        check_range_on_host("t", t, len(self))
        return t

    def _numbers(self, t: int | Tensor, x: Tensor) -> list[Any]:
        """The nine numbers of a step, or nine tensors [N, 1, …] of x's dtype."""
        if not isinstance(t, Tensor):
            row: list[Any] = self.rows[len(self) - 1 - as_int("t", t, len(self))].tolist()
            return row
        t = self._checked(t, x)
        rows = self._rows_by_device.get(x.device)
        if rows is None:
            with torch.inference_mode(False):
                rows = self.rows.flip(0).to(x.device)
            self._rows_by_device[x.device] = rows
        found = rows[t.clamp(0, len(self) - 1)].to(x.dtype)
        return [column.reshape(-1, *[1] * (x.ndim - 1)) for column in found.unbind(1)]


def _is(number: Any, value: float) -> bool:
    """Whether a step's number is known to be this one."""
    return isinstance(number, float) and number == value


def _is_like(tensor: Tensor, x: Tensor) -> bool:
    return tensor.shape == x.shape and tensor.dtype in FLOAT_DTYPES and tensor.device == x.device
