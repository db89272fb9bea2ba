"""One step of diffusers' schedulers: its timestep, its noise, its kernel."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import checks
from ..ops.randn import randn
from ..ops.reverse_step import NO_CLIP
from ..ops.reverse_step import _reverse_step as reverse_step_now
from ..ops.reverse_step_run import STREAM, VARIANCES
from .diffusers_forward import ForwardProcess
from .diffusers_tables import Plan, Rows, plan_of
from .noise import NoiseSource, fresh_seed

_LEARNED_RANGE, _LEARNED = VARIANCES.index("learned_range"), VARIANCES.index("learned")


class FusedSteps(ForwardProcess):
    """Stands before a stock scheduler.

    Attributes:
        noise_source: what is drawn where no generator is passed.
    """

    noise_source: NoiseSource = NoiseSource()
    timesteps: Tensor
    _plan: Plan | None = None
    _host_timesteps: tuple[Tensor, int, Tensor] | None = None  # on a device, version, on the host
    _seed: int = 0
    _last_t: int = -1  # where the trajectory stands that _seed was drawn for

    def _place_timesteps(self, device: str | torch.device | None) -> None:
        """Moves the timesteps, which lie on the host, and begins a new trajectory."""
        host = self.timesteps
        self._last_t = -1
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
        self._plan = plan = plan_of(self, self._alphas_on_host(), host)
        return plan

    def _advance(
        self,
        plan: Plan,
        rows: Rows,
        m: Tensor,
        timestep: Any,
        x: Tensor,
        generator: Any,
        noise: Tensor | None,
        draws: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """x′ and x̂₀. ``draws``: whether the step has noise, or None: where t > 0."""
        t, ts = timestep, None
        if type(t) is not int:
            if isinstance(t, Tensor) and t.is_cpu and t.numel() == 1:
                t = t.item()
            if type(t) is not int:
                t, ts = _read(plan, t, x)
        if ts is None:
            if not 0 <= t < plan.last or not (plan.listed is None or plan.listed[t]):
                raise _unknown_timestep(plan, t)
            row, steps = plan.last - 1 - t, None
            if draws is None:
                draws = t > 0
        else:
            row, steps = 0, plan.last - 1 - ts
            if draws is None:
                draws = t > 0 or t == _UNKNOWN

        shape = x.shape
        code = plan.same if m.shape == shape else plan.doubled if _is_double(m, x) else None
        if code is None or m.device != x.device:
            raise _mismatch(plan, m, x)
        seed, ids = 0, None
        if draws and noise is None:
            if generator is not None or self.noise_source.source == "torch":
                noise = _from_torch(generator, shape, m)
            else:
                seed, ids = self._address(t if ts is None else _UNKNOWN, shape[0], x.device)
        elif not draws:
            noise = None
        dtype = x.dtype
        if m.dtype is not dtype:
            dtype = torch.promote_types(dtype, m.dtype)
        x0_dtype = m.dtype if plan.returns_output else dtype
        if noise is not None and noise.dtype is not dtype:
            dtype = torch.promote_types(dtype, noise.dtype)

        if plan.takes_root or dtype not in checks.FLOAT_DTYPES or _is_transformed(x, m):
            work = torch.float64 if dtype is torch.float64 else torch.float32
            _check_floating(x, m)
            if draws and noise is None:
                index = t if ts is None else ts.expand(shape[0])
                noise = randn(
                    shape, seed=seed, sample_ids=ids, stream=STREAM, index=index, device=x.device
                )
            numbers = rows.at(row, steps, x, work)
            x_next, x0 = self._plain(plan, numbers, x.to(work), m.to(work), noise, code)
            x_next = x_next.to(dtype)
        else:
            given = None
            if plan.thresholds:
                given = self._x0(plan, rows.at(row, steps, x, torch.float32), x.float(), m.float())
            if x.dtype is not dtype:
                x = x.to(dtype)
            if seed >= 1 << 63:
                seed -= 1 << 64
            table, timesteps = rows.on(x.device)
            lo, hi = plan.clip
            now = checks.runs_now(x, m, noise, given)
            run = reverse_step_now if now else torch.ops.ddpm_fast.reverse_step.default
            x_next, x0 = run(
                *(x, m, table, timesteps, row, steps, seed, None, ids, code, lo, hi),
                *(None, 1.0, None, noise, given, True),
            )
        return x_next, x0 if x0.dtype is x0_dtype else x0.to(x0_dtype)

    def _address(self, t: int, samples: int, device: torch.device) -> tuple[int, Tensor | None]:
        """The seed in [0, 2^64) and the ids of a step's noise; a fresh seed for each trajectory,
        which ends where t does not go down."""
        source = self.noise_source
        seed = source.seed
        if seed is None:
            if not 0 <= t < self._last_t:
                self._seed = fresh_seed()
            seed, self._last_t = self._seed, t
        ids = source.sample_ids
        if ids is None:
            return seed, None
        if isinstance(ids, Tensor):
            ids = ids.to(device)
        return seed, checks.noise_address(0, ids, samples, device)[2]

    def _x0(self, plan: Plan, numbers: list[Any], x: Tensor, m: Tensor) -> Tensor:
        """x̂₀ of the model's mean channels, clipped or thresholded."""
        r, c_x, c_m = numbers[:3]
        m = m[:, : x.shape[1]]
        x0 = m
        if not plan.returns_output:
            x0 = _plus(x if type(c_x) is float and c_x == 1 else x * c_x, c_m, m) * r
        if plan.thresholds:
            thresholded: Tensor = self._threshold_sample(x0)  # type: ignore[attr-defined]
            return thresholded
        return x0 if plan.clip == NO_CLIP else x0.clamp(*plan.clip)

    def _plain(
        self, plan: Plan, numbers: list[Any], x: Tensor, m: Tensor, noise: Tensor | None, code: int
    ) -> tuple[Tensor, Tensor]:
        """The step in PyTorch: in float64, which the kernels do not take, and where derivatives are
        asked for, whose own backward is quicker than that of the kernel."""
        b_0, b_x, b_m, sigma, log_min, log_max = numbers[3:]
        x0 = self._x0(plan, numbers, x, m)
        channels = x.shape[1]
        x_next = _plus(x0 * b_0, b_x, x)
        if not (type(b_m) is float and b_m == 0):
            x_next = _plus(x_next, b_m, m[:, :channels])
        if noise is None:
            return x_next, x0
        noise = noise.to(x.dtype)
        second = m[:, channels:]
        if plan.takes_root:
            noise = second**0.5 * noise
        elif code in (_LEARNED, _LEARNED_RANGE):
            if code == _LEARNED_RANGE:
                second = _plus(log_min, 0.5 * (log_max - log_min), second + 1)
            noise = (0.5 * second).exp() * noise
        return _plus(x_next, sigma, noise), x0


_UNKNOWN = -1  # a timestep that cannot be read


def _read(plan: Plan, timestep: Any, x: Tensor) -> tuple[int, Tensor | None]:
    """A timestep as a number; or the greatest of several, or _UNKNOWN, and int64 on x's device,
    0-d or one a sample."""
    if not isinstance(timestep, Tensor):
        return checks.as_int("timestep", timestep, plan.last), None
    if timestep.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"timestep must be int64; got {timestep.dtype}")
    if timestep.numel() == 1:
        address = timestep.data_ptr()
        if plan.first_address <= address < plan.end_address and timestep.dtype is torch.int64:
            assert plan.timesteps is not None
            return plan.timesteps[(address - plan.first_address) // 8], None
        return _UNKNOWN, timestep.reshape(()).to(x.device, torch.int64)
    if timestep.shape != x.shape[:1]:
        raise ValueError(
            f"timestep must be one number or one a sample, {[x.shape[0]]}; got "
            f"{list(timestep.shape)}"
        )
    greatest = _UNKNOWN
    if timestep.is_cpu:
        values = timestep.tolist()
        for t in values:
            if not 0 <= t < plan.last or not (plan.listed is None or plan.listed[t]):
                raise _unknown_timestep(plan, t)
        greatest = max(values, default=0)
    return greatest, timestep.to(x.device, torch.int64).contiguous()


def _unknown_timestep(plan: Plan, t: int) -> ValueError:
    if not 0 <= t < plan.last:
        return ValueError(f"timestep must lie in 0 … {plan.last - 1}; got {t}")
    listed = plan.timesteps or []
    some = ", ".join(map(str, listed[:3])) + (", …" if len(listed) > 3 else "")
    return ValueError(f"timestep {t} is not one of the scheduler's {len(listed)}: {some}")


def _is_double(m: Tensor, x: Tensor) -> bool:
    shape = x.shape
    return len(shape) > 1 and m.shape == (shape[0], 2 * shape[1], *shape[2:])


def _mismatch(plan: Plan, m: Tensor, x: Tensor) -> ValueError:
    if m.device != x.device:
        return ValueError(f"model_output must be on {x.device}, as sample is; got {m.device}")
    shape = list(x.shape)
    doubled = [shape[0], 2 * shape[1], *shape[2:]] if len(shape) > 1 else shape
    accepted = [shape] if plan.same is not None else []
    if plan.doubled is not None or plan.takes_root:
        accepted.append(doubled)
    return ValueError(
        f"model_output must have shape {' or '.join(map(str, accepted))}, with a sample of "
        f"{shape} and this variance_type; got {list(m.shape)}"
    )


def _from_torch(generator: Any, shape: torch.Size, m: Tensor) -> Tensor:
    """The noise that the stock step draws, of the model output's dtype."""
    if generator is not None:
        _check_generator(generator, shape[0], m.device)
    noise: Tensor = randn_tensor(shape, generator=generator, device=m.device, dtype=m.dtype)
    return noise


def _check_generator(generator: Any, samples: int, device: torch.device) -> None:
    several = generator if isinstance(generator, list) else [generator]
    for one in several:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them; got {type(one).__name__}"
            )
        if one.device.type not in ("cpu", device.type):
            raise ValueError(
                f"the generator is on {one.device} and the sample on {device}; give one on "
                f"{device} or on the CPU"
            )
    if len(several) != 1 and len(several) < samples:
        raise ValueError(f"generator must be one, or one a sample, {samples}; got {len(several)}")


def _is_transformed(x: Tensor, m: Tensor) -> bool:
    """Whether derivatives are asked for, or a transform of torch.func is at work."""
    return (
        (torch.is_grad_enabled() and (x.requires_grad or m.requires_grad))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _check_floating(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (*checks.FLOAT_DTYPES, torch.float64):
            raise TypeError(f"sample and model_output must be floating point; got {tensor.dtype}")


def _plus(a: Any, number: Any, b: Tensor) -> Tensor:
    """a + number · b."""
    if type(number) is float and isinstance(a, Tensor):
        return torch.add(a, b, alpha=number)
    return torch.addcmul(a, b, number) if isinstance(a, Tensor) else a + number * b


def fitted(noise: Tensor, x: Tensor) -> Tensor:
    """Noise that was given, of x's shape."""
    if not isinstance(noise, Tensor) or noise.device != x.device:
        found = noise.device if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"variance_noise must be a tensor on {x.device}; got {found}")
    try:
        return noise.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"variance_noise must have shape {list(x.shape)}; got {list(noise.shape)}"
        ) from None
