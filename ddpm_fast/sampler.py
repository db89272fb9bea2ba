"""Sampler: the reverse process around any model, one kernel a step.

Algorithm 2 of Ho et al. 2020 (DDPM) and eq. 12 of Song et al. 2021 (DDIM), for models that predict
ε, x_0 or v, with classifier-free guidance (Ho & Salimans 2022) and dynamic thresholding (Saharia et
al. 2022, section 2.3).
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .backends import Backend, require
from .capture.graphs import Graphs
from .engine import Plan
from .model import Model
from .ops.checks import finite
from .ops.reverse_step import check_clip
from .planning import Planner
from .progress import bar
from .resuming import Keeper
from .sampling import Run, SampleStep
from .schedule import (
    EpsSource,
    Method,
    NoiseSchedule,
    Prediction,
    Spacing,
    Variance,
)
from .step_table import StepTable

if TYPE_CHECKING:
    from .sessions import Session


class Sampler:
    """Draws samples from a diffusion model; a seed's noise is the same bits on every device and in
    every batch split.

    So are the samples in any batch where the model is a float32 plan on a CPU; elsewhere they are
    the same to the model's own rounding. The state is float32; the model gets it in its
    parameters' dtype.

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
        graph: "auto": on a GPU a step is captured in a graph, which is played at every row, to the
            same bits; where it cannot be, one warning says why (docs/cuda.md). "off": never.
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
            guidance_scale = _checked_scale(guidance_scale)
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
        self._trajectory: dict[str, Any] = {
            "prediction": prediction,
            "variance": variance,
            "method": method,
            "eta": eta,
            "spacing": spacing,
            "eps_source": eps_source,
        }
        self.table = schedule.step_table(
            num_steps=num_steps, timesteps=timesteps, **self._trajectory
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
        self._graphs = Graphs()

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
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
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
            checkpoint: the folder of this call's state, docs/resuming.md. A call that was
                interrupted is made again, in another process, and goes on from there, to the bits
                of one that was not; once it is done, its result is read from there. What cannot be
                compared must be the same: what functions compute, a ``callback`` that changes x. A
                callback sees the steps that are taken in its process.
            checkpoint_every: steps from one save to the next. An exception, Ctrl-C's too, saves
                the state after the last step.

        Returns:
            float32 [N, C, …] on the sampler's device.

        Raises:
            TypeError, ValueError: an argument out of its range; a model output of another shape or
                dtype, named with its step; a checkpoint of another call, named with what differs,
                or of something else.
            InUseError, OSError: the checkpoint's folder is another process's, or cannot be written.
            FloatingPointError: the state turned NaN, named with the step at which it did.
        """
        run = Run(self, shape, seed, sample_ids, x_T, start, model_kwargs, uncond_kwargs)
        first, count = run.row, len(run.rows)
        keeping: contextlib.AbstractContextManager[Keeper | None] = contextlib.nullcontext()
        if checkpoint is not None:
            keeping = Keeper(checkpoint, checkpoint_every, run, given=x_T is not None)
        with keeping as keeper, bar(progress, count, "sampling", "step", run.row - first) as shown:
            x, done = run.x, run.row
            steps = run.steps(every_state=callback is not None, paced=progress)
            for step in steps if run.rows else ():
                x = step.x
                if callback is not None:
                    callback(step)
                if keeper is not None:
                    keeper.after(step.step + 1, x)
                shown.update(step.step + 1 - done)
                done = step.step + 1
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
        run = Run(self, shape, seed, sample_ids, x_T, start, model_kwargs, uncond_kwargs)
        return run.steps(every_state=True)

    def session(self, shape: Sequence[int], *, max_batch: int, max_waiting: int = 1024) -> Session:
        """Draws samples for many who ask at any time: those that are at different steps share a
        batch, new ones join it at the next step, finished ones leave.

        Each is the sample that ``sample([1, *shape], …)`` draws alone, its noise bit for bit, its
        state to the rounding of the model's arithmetic in a batch of another size. The sampler's
        settings count as they are now.

        Args:
            shape: [C, …] of one sample.
            max_batch: how many share a call of the model.
            max_waiting: how many may wait beside those.

        Returns:
            A :class:`Session`, a context manager.

        Raises:
            TypeError, ValueError, MemoryError: as ``sample``; a guidance_scale of the sampler that
                is [N].
        """
        from .sessions import Session

        return Session(self, shape, max_batch, max_waiting)

    def _as_it_is(self) -> Sampler:
        """For a session: what is changed later is not its."""
        scale = self.guidance_scale
        if isinstance(scale, Tensor):
            if scale.ndim:
                raise ValueError(
                    "guidance_scale must be a number in a session, where submit takes one for each "
                    f"sample; got a tensor {list(scale.shape)}"
                )
            scale = float(scale)
        sampler = copy.copy(self)
        sampler.guidance_scale = scale
        return sampler

    def table_of(self, num_steps: int | None) -> StepTable:
        """The trajectory's table; with another number of steps, of the sampler's spacing."""
        if num_steps is None:
            return self.table
        return self.schedule.step_table(num_steps=num_steps, **self._trajectory)


def _checked_scale(scale: float | Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return finite("guidance_scale", scale, "a number or a tensor")
    if scale.dtype != torch.float32 or scale.ndim > 1:
        raise TypeError(
            f"guidance_scale must be float32, 0-d or [N]; got {scale.dtype} {list(scale.shape)}"
        )
    return scale


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
