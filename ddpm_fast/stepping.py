"""A step of a Sampler, whoever takes it: model, guidance, x̂₀ and reverse_step.

One row for all samples, as a number or as a tensor on the device, or a row of its own for each.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import reference
from .backends import use_backend
from .engine import Trajectory
from .model import Model, call_model, first_parameter
from .ops.checks import FLOAT_DTYPES, indexed
from .ops.reverse_step import reverse_step
from .step_table import StepTable

if TYPE_CHECKING:
    from .sampler import Sampler

NO_NAN = torch.iinfo(torch.int32).max  # what a NaN word holds while there is none


class Stepper:
    """Takes steps by a table, which lies where the states do. It keeps no state.

    Args:
        sampler: whose clip, threshold, denoised_fn and backend count.
        table: of the steps, perhaps of several trajectories.
    """

    def __init__(self, sampler: Sampler, table: StepTable) -> None:
        self.sampler, self.table = sampler, table
        self.halves = 1 if table.model_variance == "none" else 2
        self._one_buffer = False

    def __call__(
        self,
        x: Tensor,
        row: int | Tensor,
        model: Model,
        t: Any,
        *,
        seed: int | Tensor,
        sample_ids: Tensor | None,
        kwargs: Mapping[str, Any],
        uncond_kwargs: Mapping[str, Any] | None,
        guidance_scale: float | Tensor | None,
        out: Tensor,
        out_lowp: Tensor | None,
        return_x0: bool,
        nan_step: Tensor,
        where: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step from x; arguments as of ``reverse_step``.

        Args:
            model: called with x, or where there is one with ``out_lowp``, which holds x rounded.
            t: what the model is told, a tensor [N] or whatever else ``model`` takes.
            kwargs, uncond_kwargs: of the model's calls; the second where there is guidance.
            where: added to errors, "at step 3, t = 7".
        """
        x_in = x if out_lowp is None else out_lowp
        output = self._call(model, x_in, t, kwargs, where)
        uncond = None
        if uncond_kwargs is not None:
            output, uncond = self._call_both(model, output, x_in, t, kwargs, uncond_kwargs, where)
        else:
            guidance_scale = None
        with self.backend():
            return reverse_step(
                x,
                output,
                self.table,
                row,
                seed=seed,
                sample_ids=sample_ids,
                clip=self.sampler.clip,
                model_output_uncond=uncond,
                guidance_scale=guidance_scale,
                x0=self._processed_x0(x, output, uncond, guidance_scale, row),
                return_x0=return_x0,
                out=out,
                out_lowp=out_lowp,
                nan_step=nan_step,
            )

    def backend(self) -> contextlib.AbstractContextManager[None]:
        return backend_of(self.sampler)

    def _call(
        self, model: Model, x: Tensor, t: Any, kwargs: Mapping[str, Any], where: str
    ) -> Tensor:
        version = None if x.is_inference() else x._version  # nobody counts an inference tensor's
        # The mode is the model's alone: the states are tensors without its limits
        with self.backend(), torch.inference_mode():
            output = call_model(model, x, t, kwargs, self.halves, f", {where}")
        if version is not None and x._version != version:
            raise ValueError(f"the model changed its input x in place, {where}")
        return output

    def _call_both(
        self,
        model: Model,
        output: Tensor,
        x: Tensor,
        t: Any,
        kwargs: Mapping[str, Any],
        uncond_kwargs: Mapping[str, Any],
        where: str,
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional output; a model may return one buffer every time."""
        kept = output.clone() if self._one_buffer else output
        uncond = self._call(model, x, t, uncond_kwargs, where)
        if not self._one_buffer and uncond.data_ptr() == output.data_ptr() and output.numel():
            self._one_buffer = True
            kept = self._call(model, x, t, kwargs, where).clone()
            uncond = self._call(model, x, t, uncond_kwargs, where)
        return kept, uncond

    def _processed_x0(
        self,
        x: Tensor,
        output: Tensor,
        uncond: Tensor | None,
        guidance_scale: float | Tensor | None,
        row: int | Tensor,
    ) -> Tensor | None:
        """x̂₀ through denoised_fn and the dynamic threshold, where there are any."""
        sampler = self.sampler
        if sampler.denoised_fn is None and sampler.dynamic_threshold is None:
            return None
        channels = x.shape[1]
        m = output[:, :channels].float()
        if uncond is not None:
            scale = torch.as_tensor(guidance_scale, dtype=m.dtype, device=m.device)
            m = reference.guided(m, uncond[:, :channels].float(), scale)
        if isinstance(row, Tensor):
            step = row.expand(x.shape[0])
        else:
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


def backend_of(sampler: Sampler) -> contextlib.AbstractContextManager[None]:
    """Under which the sampler's kernels run."""
    name = sampler.backend
    return contextlib.nullcontext() if name == "auto" else use_backend(name)


def checked_parameter(model: Model, stacklevel: int) -> Tensor | None:
    """Tells where a model lies and of which dtype it is, None where there is nothing to ask. Warns
    of a model in training mode.

    Raises:
        TypeError: it is float64.
    """
    if isinstance(model, nn.Module) and model.training:
        warnings.warn(
            "the model is in training mode: dropout and batch statistics are active; "
            "call model.eval() before sampling",
            stacklevel=stacklevel + 1,
        )
    parameter = first_parameter(model)
    if parameter is not None and parameter.dtype == torch.float64:
        raise TypeError("the model's parameters are float64; call model.float() first")
    return parameter


def device_of(sampler: Sampler, lies: Tensor | Trajectory | None) -> torch.device:
    """Where the sampler's states lie, unless one is given."""
    if sampler.device is not None:
        return indexed(sampler.device)
    return torch.device("cpu") if lies is None else lies.device


def low_precision(lies: Tensor | Trajectory | None) -> torch.dtype | None:
    """The model's input dtype where it is not the state's; the step writes it beside the state."""
    dtype = None if lies is None else lies.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
