"""What a step of diffusers' schedulers is given: read, drawn, and checked once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops import checks
from ...schedule import integer
from .plans import Plan

UNKNOWN = -(1 << 40)  # a timestep that cannot be read


def read(plan: Plan, timestep: Any, x: Tensor) -> tuple[int, Tensor | None]:
    """A timestep as a number; or the greatest of several, or UNKNOWN, and int64 on x's device,
    0-d or one a sample."""
    if not isinstance(timestep, Tensor):
        return integer("timestep", timestep), None
    if timestep.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"timestep must be int64; got {timestep.dtype}")
    if timestep.numel() == 1:
        address = timestep.data_ptr()
        if plan.first_address <= address < plan.end_address and timestep.dtype is torch.int64:
            assert plan.timesteps is not None
            return plan.timesteps[(address - plan.first_address) // 8], None
        return UNKNOWN, timestep.reshape(()).to(x.device, torch.int64)
    if timestep.shape != x.shape[:1]:
        raise ValueError(
            f"timestep must be one number or one a sample, {[x.shape[0]]}; got "
            f"{list(timestep.shape)}"
        )
    greatest = UNKNOWN
    if timestep.is_cpu:
        values = timestep.tolist()
        for t in values:
            if not 0 <= t < plan.last or not (plan.is_open or t in plan.places):
                raise unknown_timestep(plan, t)
        greatest = max(values, default=0)
    from_host = timestep.is_cpu  # a copy to a device has left the host when it returns
    return greatest, timestep.to(x.device, torch.int64, non_blocking=from_host).contiguous()


def unknown_timestep(plan: Plan, t: int) -> ValueError:
    if not 0 <= t < plan.last:
        return ValueError(f"timestep must lie in 0 … {plan.last - 1}; got {t}")
    listed = plan.timesteps or []
    some = ", ".join(map(str, listed[:3])) + (", …" if len(listed) > 3 else "")
    return ValueError(f"timestep {t} is not one of the scheduler's {len(listed)}: {some}")


def is_double(m: Tensor, x: Tensor) -> bool:
    shape = x.shape
    return len(shape) > 1 and m.shape == (shape[0], 2 * shape[1], *shape[2:])


def mismatch(plan: Plan, m: Tensor, x: Tensor) -> ValueError:
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


def from_torch(generator: Any, shape: torch.Size, m: Tensor) -> Tensor:
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


def check_floating(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (*checks.FLOAT_DTYPES, torch.float64):
            raise TypeError(f"sample and model_output must be floating point; got {tensor.dtype}")


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
