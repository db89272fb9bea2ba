"""One step of diffusers' schedulers: its timestep, its noise, its kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...ops import checks
from ...ops.randn import randn
from ...ops.reverse_step import NO_CLIP
from ...ops.reverse_step import _reverse_step as reverse_step_now
from ...ops.reverse_step_run import STREAM, VARIANCES
from ..noise import NoiseSource, fresh_seed
from .arguments import (
    UNKNOWN,
    check_floating,
    from_torch,
    is_double,
    mismatch,
    read,
    unknown_timestep,
)
from .forward import ForwardProcess
from .plans import Plan, plan_of

_LEARNED_RANGE, _LEARNED = VARIANCES.index("learned_range"), VARIANCES.index("learned")
_MOST_OF_HALF = 65504  # a greater alpha of torch.add's raises in float16
_MOST_OF_QUANTILE = 1 << 24  # elements that torch.quantile takes


class FusedSteps(ForwardProcess):
    """Stands before a stock scheduler.

    Attributes:
        noise_source: what is drawn where no generator is passed.
    """

    noise_source: NoiseSource = NoiseSource()
    timesteps: Tensor
    _plan: Plan | None = None
    _plans: list[Plan] | None = None  # the latest first
    _host_timesteps: tuple[Tensor, int, Tensor] | None = None  # on a device, version, on the host
    _seed: int = 0
    _ids: tuple[Tensor, Tensor] | None = None  # of noise_source, and where the samples are
    _last_t: int = UNKNOWN  # where the trajectory stands that _seed was drawn for

    def _place_timesteps(self, device: str | torch.device | None) -> None:
        """Moves the timesteps, which lie on the host, and begins a new trajectory."""
        host = self.timesteps
        self._last_t = UNKNOWN
        if device is not None:
            with torch.inference_mode(False):
                self.timesteps = placed = host.to(device)
            self._host_timesteps = placed, placed._version, host

    def _new_plan(self) -> Plan:
        host = None
        if self._host_timesteps is not None:
            placed, version, kept = self._host_timesteps
            if placed is self.timesteps and placed._version == version:
                host = kept
        if self._plans is None:
            self._plans = []
        self._plan = plan = plan_of(self, self._alphas_on_host(), host, self._plans)
        return plan

    def _advance(
        self,
        plan: Plan,
        key: Any,
        m: Tensor,
        timestep: Any,
        x: Tensor,
        generator: Any,
        noise: Tensor | None,
        draws: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """x′ and x̂₀.

        Args:
            key: of the plan's rows.
            draws: whether the step has noise, or None: where t > 0.
        """
        t, ts = timestep, None
        if type(t) is not int:
            if isinstance(t, Tensor) and t.is_cpu and t.numel() == 1:
                t = t.item()
            if type(t) is not int:
                t, ts = read(plan, t, x)
        if ts is None:
            row, steps = plan.places.get(t), None
            if row is None and not (plan.is_open and 0 <= t < plan.last):
                raise unknown_timestep(plan, t)
            rows = plan.listed.get(key)
            if rows is None or row is None:
                rows, row = plan.rows(key, t, row)
            if draws is None:
                draws = t > 0
        else:
            rows, row, steps = plan.all_rows(key), 0, plan.last - 1 - ts
            if draws is None:
                draws = t > 0 or t == UNKNOWN

        shape = x.shape
        code = plan.same if m.shape == shape else plan.doubled if is_double(m, x) else None
        if code is None or m.device != x.device:
            raise mismatch(plan, m, x)
        seed, ids = 0, None
        if draws and noise is None:
            if generator is not None or self.noise_source.source == "torch":
                noise = from_torch(generator, shape, m)
            else:
                seed, ids = self._address(plan, t if ts is None else UNKNOWN, shape[0], x.device)
        elif not draws:
            noise = None
        dtype = x.dtype
        if m.dtype is not dtype:
            dtype = torch.promote_types(dtype, m.dtype)
        x0_dtype = m.dtype if plan.returns_output else dtype
        if noise is not None and noise.dtype is not dtype:
            dtype = torch.promote_types(dtype, noise.dtype)

        plain = dtype not in checks.FLOAT_DTYPES
        now = not plain and forward_ad._current_level < 0 and checks.runs_now(x, m, noise)
        plain = plain or (not now and checks.is_transformed(x, m))
        if noise is None and draws and (plain or plan.takes_root):
            check_floating(x, m)
            index = ts.expand(shape[0]) if ts is not None else plan.index_of(t)
            noise = randn(
                shape, seed=seed, sample_ids=ids, stream=STREAM, index=index, device=x.device
            )
        if plain:
            check_floating(x, m)
            # One number for all rounds as the stock step's does; several are float32.
            is_one = steps is None and rows.exact.is_cpu
            work = dtype if is_one or dtype is torch.float64 else torch.float32
            numbers = rows.at(row, steps, x, work)
            x_next, x0 = self._plain(plan, numbers, x.to(work), m.to(work), noise, code)
            x_next = x_next.to(dtype)
        else:
            given = None
            if plan.takes_root and noise is not None:
                root = m[:, shape[1] :]
                root = root.sqrt() if root.dtype is torch.float32 else root.float().sqrt_()
                noise = root.mul_(noise)
            if plan.thresholds:
                given = self._x0(plan, rows.at(row, steps, x, torch.float32), x.float(), m.float())
            if x.dtype is not dtype:
                x = x.to(dtype)
            if seed >= 1 << 63:
                seed -= 1 << 64
            table, timesteps = rows.on(x.device)
            lo, hi = plan.clip
            run = reverse_step_now if now else torch.ops.ddpm_fast.reverse_step.default
            x_next, x0 = run(
                *(x, m, table, timesteps, row, steps, seed, None, ids, code, lo, hi),
                *(None, 1.0, None, noise, given, True),
            )
        return x_next, x0 if x0.dtype is x0_dtype else x0.to(x0_dtype)

    def _address(
        self, plan: Plan, t: int, samples: int, device: torch.device
    ) -> tuple[int, Tensor | None]:
        """The seed in [0, 2^64) and the ids of a step's noise; a fresh seed for each trajectory,
        which ends where t is not the next of the list."""
        source = self.noise_source
        seed = source.seed
        if seed is None:
            place = plan.places.get(t, 0)
            if not place or plan.timesteps[place - 1] != self._last_t:  # type: ignore[index]
                self._seed = fresh_seed()
            seed, self._last_t = self._seed, t
        ids = source.sample_ids
        if ids is None:
            return seed, None
        assert isinstance(ids, Tensor)
        if self._ids is None or self._ids[0] is not ids or self._ids[1].device != device:
            self._ids = ids, ids.to(device)
        return seed, checks.noise_address(0, self._ids[1], samples, device)[2]

    def _x0(self, plan: Plan, numbers: list[Any], x: Tensor, m: Tensor) -> Tensor:
        """x̂₀ of the model's mean channels, clipped or thresholded."""
        r, c_x, c_m = numbers[:3]
        m = m[:, : x.shape[1]]
        x0 = m
        if not plan.returns_output:
            x0 = _plus(x if type(c_x) is float and c_x == 1 else x * c_x, c_m, m) * r
        if plan.thresholds:
            wide = x0 if x0.dtype is torch.float64 else x0.float()
            return self._thresholded(wide).to(x0.dtype)
        return x0 if plan.clip == NO_CLIP else x0.clamp(*plan.clip)

    def _thresholded(self, x0: Tensor) -> Tensor:
        """What the scheduler's _threshold_sample makes of x̂₀ (Saharia et al. 2022, section 2.3), to
        the bit; the stock one is not asked to sort all elements for the sake of the largest."""
        this: Any = self
        count = x0[0].numel() if len(x0) else 0
        ratio = this.config.dynamic_thresholding_ratio
        if (
            "_threshold_sample" in this.__dict__
            or type(this)._threshold_sample is not this.stock._threshold_sample
            or not 0.5 <= ratio <= 1
            or not 0 < count <= _MOST_OF_QUANTILE
        ):
            thresholded: Tensor = this._threshold_sample(x0)
            return thresholded
        number = np.float64 if x0.dtype == torch.float64 else np.float32
        position = float(number(ratio) * number(count - 1))  # rounded as torch.quantile rounds
        below = int(position)
        largest = x0.flatten(1).abs().topk(count - below, 1).values
        lower, upper = largest[:, -1], largest[:, -2 if position > below else -1]
        s = torch.lerp(lower, upper, position - below)
        s = torch.where(largest[:, 0].isnan(), largest[:, 0], s)
        s = s.clamp(min=1, max=this.config.sample_max_value)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    def _plain(
        self, plan: Plan, numbers: list[Any], x: Tensor, m: Tensor, noise: Tensor | None, code: int
    ) -> tuple[Tensor, Tensor]:
        """The step in PyTorch: in float64, which the kernels do not take, and where derivatives are
        asked for, whose own backward is quicker than that of the kernel."""
        b_0, b_x, b_m, sigma, log_min, log_max = numbers[3:]
        x0 = self._x0(plan, numbers, x, m)
        channels = x.shape[1]
        x_next = x0 * b_0
        if not (type(b_x) is float and b_x == 0):
            x_next = _plus(x_next, b_x, x)
        if not (type(b_m) is float and b_m == 0):
            x_next = _plus(x_next, b_m, m[:, :channels])
        if noise is None:
            return x_next, x0
        noise = noise.to(x.dtype)
        second = m[:, channels:]
        if plan.takes_root:
            if type(sigma) is float:
                return torch.addcmul(x_next, second**0.5, noise, value=sigma), x0
            noise = second**0.5 * noise
        elif code in (_LEARNED, _LEARNED_RANGE):
            if code == _LEARNED_RANGE:
                second = _plus(log_min, 0.5 * (log_max - log_min), second + 1)
            noise = (0.5 * second).exp() * noise
        return _plus(x_next, sigma, noise), x0


def _plus(a: Any, number: Any, b: Tensor) -> Tensor:
    """a + number · b."""
    if type(number) is not float:
        return torch.addcmul(a, b, number) if isinstance(a, Tensor) else a + number * b
    if not isinstance(a, Tensor) or _MOST_OF_HALF < abs(number) < math.inf:
        return a + number * b
    return torch.add(a, b, alpha=number)
