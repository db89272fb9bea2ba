"""The steps of diffusers' DDPMScheduler and DDIMScheduler as rows of numbers, one a timestep.

Their formulas, computed from their tables in their tables' dtype: where those lose digits or do
something odd, so do these. On the host it is numpy that computes, whose calls are shorter; where
tables lie on a device torch does, and nothing reads a value back. Nothing here imports diffusers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEARNED = ("learned", "learned_range")
UNLISTED = -(1 << 40)  # the previous timestep of one that the scheduler's list does not hold

Array = Any  # of numpy or of torch


@dataclass(eq=False)
class Rows:
    """What reverse_step takes at some timesteps.

    Attributes:
        exact: float64 [K, 9], the columns of StepTable, on the device of the scheduler's tables.
        indices: int64 [K], of the noise: the timestep, or T − 1 − t for one below 0.
    """

    exact: Tensor
    indices: Tensor
    _single: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _double: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows in float32 and their indices, as the kernels take them."""
        found = self._single.get(device)
        if found is None:
            with plainly():
                rows = self.exact.to(device, torch.float32)
                indices = self.indices.to(device)
            found = self._single[device] = rows, indices
        return found

    def at(self, row: int, steps: Tensor | None, like: Tensor, dtype: torch.dtype) -> list[Any]:
        """The nine numbers of a step, or nine tensors that meet ``like``'s dimensions."""
        if steps is None and self.exact.is_cpu:
            numbers: list[Any] = self.exact[row].tolist()
            return numbers
        exact = self._double.get(like.device)
        if exact is None:
            with plainly():
                exact = self._double.setdefault(like.device, self.exact.to(like.device))
        found = exact[row : row + 1] if steps is None else exact[steps.reshape(-1)]
        shape = [-1, *[1] * (like.ndim - 1)]
        return [column.reshape(shape).to(dtype) for column in found.unbind(1)]


_NOTHING = contextlib.nullcontext()


def plainly() -> Any:
    """Leaves inference mode, whose tensors autograd cannot save, and the transforms of torch.func,
    in which tensors have no numpy array. Leaving costs a microsecond and is done at need."""
    if torch._C._are_functorch_transforms_active():
        leave = contextlib.ExitStack()
        leave.enter_context(torch._C._DisableFuncTorch())
        leave.enter_context(torch.inference_mode(False))
        return leave
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def before(alphas: Array, final: Any, previous: Array) -> Array:
    """ᾱ of the previous timesteps, ``final`` where there is none."""
    if isinstance(alphas, np.ndarray):
        if len(previous) == 1:
            found = alphas[previous] if previous[0] >= 0 else np.array([final], alphas.dtype)
            return found
        found = alphas[np.maximum(previous, 0)]
        found[previous < 0] = final
        return found
    return torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)


def ddpm_columns(
    t: Array, alphas: Array, alphas_before: Array, config: Any, use: str
) -> Sequence[Array]:
    """Ho et al. 2020, eqs. 7 and 15, for any two neighbours of the list. ``use``: what the step
    takes the variance for, the scheduler's own variance_type."""
    xp = np if isinstance(t, np.ndarray) else torch
    beta, beta_before = 1 - alphas, 1 - alphas_before
    alpha_step = alphas / alphas_before
    beta_step = 1 - alpha_step
    small = beta_before / beta * beta_step
    small = np.maximum(small, 1e-20) if xp is np else small.clamp(min=1e-20)
    kind = config["variance_type"]
    variance = small
    if kind == "fixed_small_log":
        variance = _exp(0.5 * _log(small))
    elif kind == "fixed_large":
        variance = beta_step
    elif kind == "fixed_large_log":
        variance = _log(beta_step)  # and its root is NaN, there as here
    signal, noise, signal_before, shrunk, root = _roots(
        alphas, beta, alphas_before, alpha_step, variance
    )
    if kind in LEARNED:
        sigma = xp.ones_like(small)
    elif use == "fixed_small_log":
        sigma = variance
    else:
        sigma = _exp(0.5 * variance) if use == "learned_range" else root
    b_0 = signal_before * beta_step / beta
    b_x = shrunk * beta_before / beta
    low, high = (_log(small), _log(beta_step)) if use in LEARNED else (0, 0)
    sigma = xp.where(t > 0, sigma, xp.zeros_like(sigma))
    return *_x0_columns(xp, signal, noise, config["prediction_type"]), b_0, b_x, 0, sigma, low, high


def ddim_columns(
    t: Array, alphas: Array, alphas_before: Array, config: Any, eta: float, clipped: bool
) -> Sequence[Array]:
    """Song et al. 2021, eqs. 12 and 16."""
    xp = np if isinstance(t, np.ndarray) else torch
    beta, beta_before = 1 - alphas, 1 - alphas_before
    signal, noise, signal_before, spread = _roots(
        alphas, beta, alphas_before, (beta_before / beta) * (1 - alphas / alphas_before)
    )
    sigma = eta * spread
    (direction,) = _roots(beta_before - sigma * sigma)
    x0_columns = _x0_columns(xp, signal, noise, config["prediction_type"])
    direction, b_0, signal, noise = (
        xp.asarray(root, dtype=xp.float64) for root in (direction, signal_before, signal, noise)
    )
    b_x: Any = 0
    b_m: Any = 0
    prediction = config["prediction_type"]
    if not clipped and prediction == "epsilon":
        b_m = direction
    elif clipped:  # ε = (x − √ᾱ x̂₀)/√(1−ᾱ) of the clipped x̂₀
        b_0, b_x = b_0 - direction * signal / noise, direction / noise
    elif prediction == "sample":
        b_x, b_m = direction / noise, -direction * signal / noise
    else:
        b_x, b_m = direction * noise, direction * signal
    drawn = sigma if eta > 0 else 0
    return *x0_columns, b_0, b_x, b_m, drawn, 0, 0


def _x0_columns(
    xp: Any, signal: Array, noise: Array, prediction: str
) -> tuple[Array, Array, Array]:
    """r, c_x, c_m."""
    if prediction == "sample":
        return 1, 0, 1
    if prediction == "epsilon":
        return 1 / xp.asarray(signal, dtype=xp.float64), 1, -noise
    return 1, signal, -noise


# Torch's own functions, to the last digit, as the stock step has them: its roots are not numpy's.


def _roots(*numbers: Array) -> Array:
    """Of several arrays at one call: most of it is the call."""
    if isinstance(numbers[0], np.ndarray):
        return torch.from_numpy(np.array(numbers)).sqrt().numpy()
    return torch.stack(numbers).sqrt()


def _log(numbers: Array) -> Array:
    on_host = isinstance(numbers, np.ndarray)
    return torch.from_numpy(numbers).log().numpy() if on_host else numbers.log()


def _exp(numbers: Array) -> Array:
    on_host = isinstance(numbers, np.ndarray)
    return torch.from_numpy(numbers).exp().numpy() if on_host else numbers.exp()


def rows_of(t: Array, last: int, columns: Sequence[Array]) -> Rows:
    """From the timesteps and columns of as many numbers, or of one for all."""
    if isinstance(t, np.ndarray):
        filled = np.empty((len(t), len(columns)))
        for place, column in enumerate(columns):
            filled[:, place] = column
        indices = np.where(t >= 0, t, last - 1 - t) if (t < 0).any() else t
        return Rows(torch.from_numpy(filled), torch.from_numpy(indices))
    exact = torch.empty(len(t), len(columns), dtype=torch.float64, device=t.device)
    for place, column in enumerate(columns):
        exact[:, place] = column
    return Rows(exact, t)


def next_in(timesteps: Tensor, last: int) -> Tensor:
    """Of each of T timesteps the one after its first place in the list, −1 after the last."""
    count = len(timesteps)
    inside = (timesteps >= 0) & (timesteps < last)
    slots = torch.where(inside, timesteps, last).long()
    places = torch.arange(count, device=timesteps.device)
    first = torch.full((last + 1,), count, device=timesteps.device)
    first = first.scatter_reduce(0, slots, places, "amin")[:last]
    ends = torch.tensor([-1, UNLISTED], device=timesteps.device)
    after = torch.cat([timesteps[1:].long(), ends[:1] if count else ends[:0], ends[1:]])
    return after[first]
