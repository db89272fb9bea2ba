"""One trajectory of a Sampler: its checked arguments, its state, and its steps."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import reference
from .backends import use_backend
from .engine import Trajectory
from .model import call_model, first_parameter
from .ops.checks import FLOAT_DTYPES, check_ids_on_host, dense, indexed, noise_address
from .ops.randn import randn
from .ops.reverse_step import reverse_step
from .schedule import integer

if TYPE_CHECKING:
    from .sampler import Sampler

_NO_NAN = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class SampleStep:
    """What :meth:`Sampler.stream` yields after each step.

    Attributes:
        step: row of the table, 0 for the first.
        t: the timestep that was left.
        x: float32 [N, …], the state after the step. Changes made to it in place are kept, so that a
            known region can be pasted in.
        x0: float32 [N, …], the clipped x̂₀ of the step.
    """

    step: int
    t: int
    x: Tensor
    x0: Tensor


class Run:
    """One trajectory: its checked arguments and its state."""

    def __init__(
        self,
        sampler: Sampler,
        shape: Sequence[int],
        seed: int | Tensor,
        sample_ids: Tensor | Sequence[int] | None,
        x_T: Tensor | None,
        start: int | None,
        model_kwargs: Mapping[str, Any] | None,
        uncond_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.sampler = sampler
        if isinstance(shape, (int, str)):
            raise TypeError(f"shape must be [N, C, …]; got {shape!r}")
        shape = [integer("shape", size) for size in shape]
        if len(shape) < 2:
            raise ValueError(f"shape must be [N, C, …]; got {shape}")
        if (sampler.guidance_scale is None) != (uncond_kwargs is None):
            raise ValueError(
                "guidance takes the Sampler's guidance_scale and uncond_kwargs, both or neither"
            )
        if start is not None and x_T is None:
            raise ValueError("start needs x_T, the state that its row begins with")
        first = 0 if start is None else integer("start", start)
        if not 0 <= first < len(sampler):
            raise ValueError(f"start must lie in 0 … {len(sampler) - 1}; got {start}")
        model = sampler.model
        if isinstance(model, nn.Module) and model.training:
            warnings.warn(
                "the model is in training mode: dropout and batch statistics are active; "
                "call model.eval() before sampling",
                stacklevel=3,
            )
        parameter = first_parameter(model)
        if x_T is not None and not isinstance(x_T, Tensor):
            raise TypeError(f"x_T must be a tensor; got {type(x_T).__name__}")
        if parameter is not None and parameter.dtype == torch.float64:
            raise TypeError("the model's parameters are float64; call model.float() first")
        told = sampler.model_timesteps
        self.timesteps: list[int] = sampler.table.timesteps.tolist()
        self.model_timesteps = self.timesteps if told is None else told[self.timesteps].tolist()
        self.t_dtype = torch.int64 if told is None else told.dtype
        with self.backend():
            self.plan = sampler._planner.trajectory(model, self.model_timesteps, shape)
        lies = parameter if self.plan is None else self.plan
        device = _device_of(sampler, x_T, lies)
        _, seeds, ids = noise_address(seed, sample_ids, shape[0], device)
        check_ids_on_host(ids)
        self.seed = seed if seeds is None else seeds
        self.sample_ids = ids
        self.rows = range(first, len(sampler))
        self.one_buffer = False
        self.table = sampler.table.to(device)
        self.model_kwargs = dict(model_kwargs or {})
        self.uncond_kwargs = None if uncond_kwargs is None else dict(uncond_kwargs)
        # The model's input dtype where it is not the state's; the step writes it beside the state.
        dtype = None if lies is None else lies.dtype
        self.low_precision = dtype if dtype in (torch.bfloat16, torch.float16) else None
        if x_T is None:
            with self.backend():
                self.x = randn(shape, seed=self.seed, sample_ids=ids, device=device)
        else:
            if list(x_T.shape) != shape:
                raise ValueError(f"x_T must have shape {shape}; got {list(x_T.shape)}")
            if not x_T.is_floating_point():
                raise TypeError(f"x_T must be floating point; got {x_T.dtype}")
            # A copy, since the steps are taken in place, dense in whichever order it has.
            self.x, _ = dense(x_T.detach().to(torch.float32, copy=True))

    @torch.no_grad()
    def steps(self, every_state: bool) -> Iterator[SampleStep]:
        """Takes the steps. ``every_state``: each yields tensors of its own, with x̂₀."""
        x, sampler = self.x, self.sampler
        nan_step = torch.full((1,), _NO_NAN, dtype=torch.int32, device=x.device)
        lowp = None if self.low_precision is None else x.to(self.low_precision)
        x0 = x
        for row in self.rows:
            x_in = x if lowp is None else lowp
            t = self._told(row)
            output = self._call(x_in, t, self.model_kwargs, row)
            uncond = None
            if self.uncond_kwargs is not None:
                output, uncond = self._call_both(output, x_in, t, row)
            with self.backend():
                result = reverse_step(
                    x,
                    output,
                    self.table,
                    row,
                    seed=self.seed,
                    sample_ids=self.sample_ids,
                    clip=sampler.clip,
                    model_output_uncond=uncond,
                    guidance_scale=sampler.guidance_scale,
                    x0=self._processed_x0(x, output, uncond, row),
                    return_x0=every_state,
                    out=torch.empty_like(x) if every_state else x,
                    out_lowp=lowp,
                    nan_step=nan_step,
                )
            if isinstance(result, tuple):
                x, x0 = result
            if x.device.type == "cpu":
                _raise_if_nan(nan_step, self.timesteps)
            yield SampleStep(row, self.timesteps[row], x, x0)
            if every_state and lowp is not None:
                lowp.copy_(x)  # whoever got the state may have changed it
        _raise_if_nan(nan_step, self.timesteps)

    def backend(self) -> contextlib.AbstractContextManager[None]:
        name = self.sampler.backend
        return contextlib.nullcontext() if name == "auto" else use_backend(name)

    def _told(self, row: int) -> Any:
        """What the model is given as t: the row itself, where it is a plan of the trajectory."""
        if self.plan is not None:
            return row
        told, count = self.model_timesteps[row], self.x.shape[0]
        return torch.full((count,), told, dtype=self.t_dtype, device=self.x.device)

    def _call(self, x: Tensor, t: Any, kwargs: dict[str, Any], row: int) -> Tensor:
        model = self.sampler.model if self.plan is None else self.plan.of_row
        version = None if x.is_inference() else x._version  # nobody counts an inference tensor's
        halves = 1 if self.table.model_variance == "none" else 2
        where = f", at step {row}, t = {self.timesteps[row]}"
        # The mode is the model's alone: the states are tensors without its limits
        with self.backend(), torch.inference_mode():
            output = call_model(model, x, t, kwargs, halves, where)
        if version is not None and x._version != version:
            raise ValueError(f"the model changed its input x in place, at step {row}")
        return output

    def _call_both(self, output: Tensor, x: Tensor, t: Any, row: int) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional output; a model may return one buffer every time."""
        assert self.uncond_kwargs is not None
        kept = output.clone() if self.one_buffer else output
        uncond = self._call(x, t, self.uncond_kwargs, row)
        if not self.one_buffer and uncond.data_ptr() == output.data_ptr() and output.numel():
            self.one_buffer = True
            kept = self._call(x, t, self.model_kwargs, row).clone()
            uncond = self._call(x, t, self.uncond_kwargs, row)
        return kept, uncond

    def _processed_x0(
        self, x: Tensor, output: Tensor, uncond: Tensor | None, row: int
    ) -> Tensor | None:
        """x̂₀ through denoised_fn and the dynamic threshold, where there are any."""
        sampler = self.sampler
        if sampler.denoised_fn is None and sampler.dynamic_threshold is None:
            return None
        channels = x.shape[1]
        m = output[:, :channels].float()
        if uncond is not None:
            scale = torch.as_tensor(sampler.guidance_scale, dtype=m.dtype, device=m.device)
            m = reference.guided(m, uncond[:, :channels].float(), scale)
        step = torch.full((x.shape[0],), row, device=x.device)
        x0 = reference.predict_x0(x, m, self.table.rows, step)
        if sampler.denoised_fn is not None:
            x0 = sampler.denoised_fn(x0)
            if not isinstance(x0, Tensor) or x0.shape != x.shape or x0.dtype not in FLOAT_DTYPES:
                found = f"{list(x0.shape)} {x0.dtype}" if isinstance(x0, Tensor) else type(x0)
                raise ValueError(
                    f"denoised_fn must return a float tensor of shape {list(x.shape)}; got {found}"
                )
            x0 = x0.float()
        if sampler.dynamic_threshold is not None and x0.numel():
            assert sampler.clip is not None
            x0 = dynamic_threshold(x0, sampler.dynamic_threshold, sampler.clip[1])
        return x0


def dynamic_threshold(x0: Tensor, quantile: float, bound: float = 1.0) -> Tensor:
    """x̂₀ clipped to ±s and scaled by bound/s, s = max(bound, the quantile of |x̂₀|) a sample.

    Saharia et al. 2022, section 2.3 and appendix D.
    """
    # Not torch.quantile, which takes at most 2^24 elements.
    magnitudes = x0.flatten(1).abs()
    position = quantile * (magnitudes.shape[1] - 1)
    below, above = math.floor(position), math.ceil(position)
    ordered = magnitudes.sort(1).values
    s = torch.lerp(ordered[:, below], ordered[:, above], position - below)
    s = s.clamp(min=bound).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) * (bound / s)


def _device_of(
    sampler: Sampler,
    x_T: Tensor | None,
    lies: Tensor | Trajectory | None,
) -> torch.device:
    if x_T is not None:
        return x_T.device
    if sampler.device is not None:
        return indexed(sampler.device)
    return torch.device("cpu") if lies is None else lies.device


def _raise_if_nan(nan_step: Tensor, timesteps: list[int]) -> None:
    row = int(nan_step)
    if row != _NO_NAN:
        raise FloatingPointError(
            f"the state turned NaN at step {row}, t = {timesteps[row]}: the output of the model "
            "(or of denoised_fn) is NaN or infinite there"
        )
