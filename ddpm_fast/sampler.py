"""Sampler: the reverse process around any model, one kernel a step.

Algorithm 2 of Ho et al. 2020 (DDPM) and eq. 12 of Song et al. 2021 (DDIM), for models that predict
ε, x_0 or v, with classifier-free guidance (Ho & Salimans 2022) and dynamic thresholding (Saharia et
al. 2022, section 2.3).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import reference
from .backends import Backend, require, use_backend
from .engine import Plan, Trajectory
from .model import Model, call_model, first_parameter
from .ops.checks import FLOAT_DTYPES, check_ids_on_host, dense, indexed, noise_address
from .ops.randn import randn
from .ops.reverse_step import check_clip, reverse_step
from .planning import Planner
from .progress import bar
from .schedule import (
    EpsSource,
    Method,
    NoiseSchedule,
    Prediction,
    Spacing,
    Variance,
    integer,
)

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


class Sampler:
    """Draws samples from a diffusion model, the same for a seed on every device and batch split.

    The state is float32; the model gets it in its parameters' dtype.

    Args:
        model: any callable ``(x [N, C, …], t int64 [N], **model_kwargs)`` returning a tensor, or an
            object whose ``.sample`` is one, or a tuple that begins with one: [N, C, …], or
            [N, 2C, …] where the variance is learned. It must leave x as it is.
        schedule: of the forward process that the model was trained on.
        prediction: what the model returns: "epsilon", "sample" (x_0) or "v_prediction".
        variance: "fixed_small" β̃, "fixed_large" β, "learned" log σ² or "learned_range".
        method: "ddpm" or "ddim".
        eta: of "ddim", 0 … 1.
        eps_source: of "ddim": "x0" rederives ε from the clipped x̂₀, "model" keeps the model's.
        num_steps, timesteps, spacing: a shorter trajectory, NoiseSchedule.spaced_timesteps.
        clip: bounds of x̂₀, or None.
        dynamic_threshold: p in (0, 1]: x̂₀ is clipped to ±s and scaled by c/s, where s is the p-th
            quantile of its absolute values, at least c, a sample; c is clip's bound, (-c, c).
        guidance_scale: s of m_u + s (m_c − m_u), a number or float32 [N]; ``sample`` then takes
            ``uncond_kwargs``.
        denoised_fn: applied to x̂₀ before the clip.
        model_timesteps: [T] integers or floats, what the model is given as t at each timestep of
            the schedule: int64 [N] of them, or float32 [N]. The timesteps themselves if None;
            ``torch.arange(T) * 1.0`` for models that take floats.
        device: of x_T where none is given: the model's parameters', else cpu.
        backend: "auto", or one to insist on, for what the model and its plan compute as well.
        graph: "auto", or "off": whether steps may be captured into a graph, on devices that have
            them. CPU tensors never are.
        plan: of a :class:`UNet` or a UNet2DModel of diffusers', which computes the same faster
            (docs/plan.md): "auto", where it can be made, else the model is called, and one warning
            says why; "off"; a :class:`Plan` of the model; or the names of rewrites. Weights that
            change are seen when a trajectory begins: whole tensors by any way, single elements
            unless they are written through ``.data`` or NumPy.
        plan_dtype: of the plan that is made; the model's if None.

    Raises:
        ValueError: an unknown name or a number out of range, here and not at the first step; there,
            a plan that cannot be made, though not "auto".
        MemoryError: there, not enough for a plan or for a shape with it, though not "auto".
        RuntimeError: the backend cannot run here.

    >>> sampler = Sampler(lambda x, t: torch.zeros_like(x), NoiseSchedule.linear(), num_steps=4)
    >>> sampler.sample([2, 3, 8, 8], seed=0).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        *,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        method: Method = "ddpm",
        eta: float = 0.0,
        eps_source: EpsSource = "x0",
        num_steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        spacing: Spacing = "leading",
        clip: tuple[float, float] | None = (-1.0, 1.0),
        dynamic_threshold: float | None = None,
        guidance_scale: float | Tensor | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_timesteps: Tensor | Sequence[float] | None = None,
        device: torch.device | str | None = None,
        backend: Backend = "auto",
        graph: Literal["auto", "off"] = "auto",
        plan: Literal["auto", "off"] | Plan | Iterable[str] = "auto",
        plan_dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable; got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
        check_clip(clip)
        if guidance_scale is not None:
            _check_guidance_scale(guidance_scale)
        if denoised_fn is not None and not callable(denoised_fn):
            raise TypeError(f"denoised_fn must be callable; got {type(denoised_fn).__name__}")
        if dynamic_threshold is not None:
            if not 0.0 < dynamic_threshold <= 1.0:
                raise ValueError(f"dynamic_threshold must lie in (0, 1]; got {dynamic_threshold}")
            if clip is None or clip[0] != -clip[1] or not 0 < clip[1] < math.inf:
                raise ValueError(f"dynamic_threshold needs a clip of (-c, c); got {clip}")
        if graph not in ("auto", "off"):
            raise ValueError(f"graph must be 'auto' or 'off'; got {graph!r}")
        require(backend)
        self.model = model
        self.schedule = schedule
        self.table = schedule.step_table(
            prediction=prediction,
            variance=variance,
            method=method,
            eta=eta,
            num_steps=num_steps,
            timesteps=timesteps,
            spacing=spacing,
            eps_source=eps_source,
        )
        self.clip = clip
        self.dynamic_threshold = dynamic_threshold
        self.guidance_scale = guidance_scale
        self.denoised_fn = denoised_fn
        self.model_timesteps = _model_timesteps(model_timesteps, schedule)
        self.device = None if device is None else torch.device(device)
        self.backend = backend
        self.graph = graph
        self._planner = Planner(plan, plan_dtype, model)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        model: Model | None = None,
        num_steps: int | None = None,
        **arguments: Any,
    ) -> Sampler:
        """The sampler of a pipeline of another library: its model, schedule, trajectory and method.

        Its noise is addressed and its coefficients are computed in float64, so that images differ
        from the pipeline's by more than rounding where docs/pipelines.md says so; ``accelerate``
        keeps to the pipeline's own. Samples come in [-1, 1], or whatever the model was trained on.

        Args:
            pipeline: what ``accelerate`` takes. OpenAI's objects hold no model: ``model`` is
                needed. Of lucidrains' those without self-conditioning.
            model: instead of the pipeline's.
            num_steps: of the trajectory; the pipeline's own if None.
            arguments: of Sampler, instead of the pipeline's.

        Raises:
            TypeError, ValueError, RuntimeError: as ``accelerate``; a pipeline that has no
                equivalent here.
        """
        from .integrations import sampler_arguments

        return cls(**{**sampler_arguments(pipeline, model, num_steps), **arguments})

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.table)

    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        x_T: Tensor | None = None,
        start: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        callback: Callable[[SampleStep], None] | None = None,
    ) -> Tensor:
        """Runs the trajectory and returns the samples.

        Args:
            shape: [N, C, …].
            seed: in [0, 2^64), or int64 [N].
            sample_ids: which samples of the seed, N non-negative integers; 0 … N−1 if None. The
                noise of an id does not depend on the others in the batch.
            x_T: the initial state, float, of ``shape``; ``randn(shape, stream=0)`` if None.
            start: the row to begin at, with x_T as that row's x_t: image-to-image, inpainting,
                resuming. Rows count from 0, the first step.
            model_kwargs: passed to the model at every call (classes, say).
            uncond_kwargs: of the unconditional call, where there is a guidance scale.
            progress: show a bar (needs tqdm).
            callback: called with a SampleStep after each step; it may change ``x`` in place.

        Returns:
            float32 [N, C, …] on the sampler's device.

        Raises:
            TypeError, ValueError: an argument out of its range; a model output of another shape or
                dtype, named with its step.
            FloatingPointError: the state turned NaN, named with the step at which it did.
        """
        run = _Run(self, shape, seed, sample_ids, x_T, start, model_kwargs, uncond_kwargs)
        x = run.x
        with bar(progress, len(run.rows), "sampling", unit="step") as shown:
            for step in run.steps(every_state=callback is not None):
                x = step.x
                if callback is not None:
                    callback(step)
                shown.update()
        return x

    def stream(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        x_T: Tensor | None = None,
        start: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[SampleStep]:
        """:meth:`sample` step by step: yields a SampleStep after each; the last has the samples."""
        run = _Run(self, shape, seed, sample_ids, x_T, start, model_kwargs, uncond_kwargs)
        return run.steps(every_state=True)


class _Run:
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


def _check_guidance_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.ndim > 1:
            raise TypeError(
                f"guidance_scale must be float32, 0-d or [N]; got {scale.dtype} {list(scale.shape)}"
            )
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale must be a number or a tensor; got {scale!r}")
    elif not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite; got {scale}")


def _model_timesteps(
    values: Tensor | Sequence[float] | None, schedule: NoiseSchedule
) -> Tensor | None:
    """[T] on the CPU, int64 or float32."""
    if values is None:
        return None
    try:
        told = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"model_timesteps must be numbers: {error}") from None
    if told.shape != (len(schedule),) or told.dtype == torch.bool or told.is_complex():
        raise ValueError(
            f"model_timesteps must be {len(schedule)} numbers, one a timestep of the schedule; got "
            f"{told.dtype} {list(told.shape)}"
        )
    return told.float() if told.is_floating_point() else told.long()


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
