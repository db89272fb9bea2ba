"""One trajectory of a Sampler: its checked arguments, its state, and its steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .capture.recorder import Pace
from .ops.checks import check_ids_on_host, dense, noise_address
from .ops.randn import randn
from .schedule import integer
from .stepping import NO_NAN, Stepper, backend_of, checked_parameter, device_of, low_precision

if TYPE_CHECKING:
    from .sampler import Sampler


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
    """One trajectory: its checked arguments and its state.

    Attributes:
        x, row: the state that a captured step goes on from, and the next row.
    """

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
        parameter = checked_parameter(model, stacklevel=3)
        if x_T is not None and not isinstance(x_T, Tensor):
            raise TypeError(f"x_T must be a tensor; got {type(x_T).__name__}")
        told = sampler.model_timesteps
        self.timesteps: list[int] = sampler.table.timesteps.tolist()
        self.model_timesteps = self.timesteps if told is None else told[self.timesteps].tolist()
        self.t_dtype = torch.int64 if told is None else told.dtype
        with backend_of(sampler):
            self.plan = sampler._planner.trajectory(model, self.model_timesteps, shape)
        lies = parameter if self.plan is None else self.plan
        device = device_of(sampler, lies) if x_T is None else x_T.device
        _, seeds, ids = noise_address(seed, sample_ids, shape[0], device)
        check_ids_on_host(ids)
        self.seed = seed if seeds is None else seeds
        self.sample_ids = ids
        self.rows = range(first, len(sampler))
        self.row = first
        self.table = sampler.table.to(device)
        self.stepper = Stepper(sampler, self.table)
        self.model_kwargs = dict(model_kwargs or {})
        self.uncond_kwargs = None if uncond_kwargs is None else dict(uncond_kwargs)
        self.low_precision = low_precision(lies)
        if x_T is None:
            with backend_of(sampler):
                self.x = randn(shape, seed=self.seed, sample_ids=ids, device=device)
        else:
            if list(x_T.shape) != shape:
                raise ValueError(f"x_T must have shape {shape}; got {list(x_T.shape)}")
            if not x_T.is_floating_point():
                raise TypeError(f"x_T must be floating point; got {x_T.dtype}")
            # A copy, since the steps are taken in place, dense in whichever order it has.
            self.x, _ = dense(x_T.detach().to(torch.float32, copy=True))

    @torch.no_grad()
    def steps(self, every_state: bool, paced: bool = False) -> Iterator[SampleStep]:
        """Takes the steps, from a graph where there is one.

        Args:
            every_state: each yields tensors of its own, with x̂₀; else the last one does, and the
                others have x alone, until the next is asked for.
            paced: none is yielded long before the device has taken it.
        """
        pace, done = Pace(self.x.device) if paced else None, self.row
        self.model = self.sampler.model if self.plan is None else self.plan.of_row
        self.nan_step = torch.full((1,), NO_NAN, dtype=torch.int32, device=self.x.device)
        with self.sampler._graphs.of(self, every_state) as captured:
            played = () if captured is None else captured.play(self)
            for step in itertools.chain(played, self._one_by_one(every_state)):
                if pace is not None:
                    pace.step(step.step + 1 - done)
                done = step.step + 1
                yield step
        raise_if_nan(self.nan_step, self.timesteps)

    def _one_by_one(self, every_state: bool) -> Iterator[SampleStep]:
        """Without a graph, from ``row`` on."""
        x, nan_step = self.x, self.nan_step
        lowp = None if self.low_precision is None else x.to(self.low_precision)
        for row in range(self.row, self.rows.stop):
            result = self.stepper(
                x,
                row,
                self.model,
                self.told(row),
                seed=self.seed,
                sample_ids=self.sample_ids,
                kwargs=self.model_kwargs,
                uncond_kwargs=self.uncond_kwargs,
                guidance_scale=self.sampler.guidance_scale,
                out=torch.empty_like(x) if every_state else x,
                out_lowp=lowp,
                return_x0=every_state,
                nan_step=nan_step,
                where=f"at step {row}, t = {self.timesteps[row]}",
            )
            x, x0 = result if isinstance(result, tuple) else (result, result)
            if x.device.type == "cpu":
                raise_if_nan(nan_step, self.timesteps)
            yield self.state(row, x, x0)
            if every_state and lowp is not None:
                lowp.copy_(x)  # whoever got the state may have changed it

    def told(self, row: int) -> Any:
        """What the model is given as t: the row itself, where it is a plan of the trajectory."""
        if self.plan is not None:
            return row
        told, count = self.model_timesteps[row], self.x.shape[0]
        return torch.full((count,), told, dtype=self.t_dtype, device=self.x.device)

    def state(self, row: int, x: Tensor, x0: Tensor) -> SampleStep:
        """What a step has left."""
        return SampleStep(row, self.timesteps[row], x, x0)


def raise_if_nan(nan_step: Tensor, timesteps: list[int]) -> None:
    row = int(nan_step)
    if row != NO_NAN:
        raise nan_error(row, timesteps[row])


def nan_error(row: int | None, t: int | None) -> FloatingPointError:
    """At a step, or at one that is not known."""
    where, there = (f" at step {row}, t = {t}", " there") if row is not None else ("", "")
    return FloatingPointError(
        f"the state turned NaN{where}: the output of the model (or of denoised_fn) is NaN or "
        f"infinite{there}"
    )
