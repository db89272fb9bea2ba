"""diffusers' DDPMScheduler and DDIMScheduler with their steps and forward process fused.

Importing this imports diffusers. docs/pipelines/diffusers.md says what is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ..accelerated import Accelerated, accelerated_class, stands_for
from . import check_library
from .arguments import fitted
from .steps import FusedSteps

check_library()

Generators = torch.Generator | list[torch.Generator] | None


class FastScheduler(FusedSteps, Accelerated):
    """What both schedulers have beside the stock class that they come before."""

    mixin: type[FastScheduler]
    stock: type
    _caches = (
        "_plan",
        "_plans",
        "_on_host",
        "_host_timesteps",
        "_forward",
        "_seed",
        "_ids",
        "_last_t",
    )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._caches}

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, stock = FastScheduler, self.stock
        if type(self) is accelerated_class(mixin, stock):
            return super().__reduce_ex__(protocol)
        return object.__reduce_ex__(self, max(protocol, 2))  # a user's subclass is found by name


class FastDDPMScheduler(FastScheduler, DDPMScheduler):
    """DDPMScheduler, each step one kernel: Ho et al. 2020, algorithm 2.

    A complete drop-in: the same config, tables, arguments and results to rounding, the same stream
    from a generator that is passed. Where none is, ``set_noise`` says what is drawn; by default
    addressed noise of a seed that is new for every trajectory. Beside a number, ``timestep`` may be
    int64 [N], one a sample. It saves as the stock class, and what that saved loads here.

    >>> from ddpm_fast.integrations.diffusers import FastDDPMScheduler
    >>> scheduler = FastDDPMScheduler(variance_type="fixed_large")
    >>> scheduler.set_noise(seed=7)
    >>> x = torch.zeros(2, 3, 8, 8)
    >>> scheduler.step(torch.ones_like(x), 999, x).prev_sample.shape
    torch.Size([2, 3, 8, 8])
    """

    mixin, stock = FastScheduler, DDPMScheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As the stock scheduler's; the numbers are kept on the host as well."""
        with torch.inference_mode(False):
            super().set_timesteps(num_inference_steps, None, timesteps)  # type: ignore[misc]
        self._place_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the reverse process, p(x_{t-1} | x_t).

        Args:
            model_output: [N, C, …], or [N, 2C, …] where the variance is learned; float.
            timestep: of the scheduler's list: a number, a 0-d tensor on any device, or int64 [N].
                One on a device is not read back, unless it is an element of ``timesteps``.
            sample: [N, C, …], x_t.
            generator: one, or a list of N; drawn from where t > 0, and where t cannot be read.
            return_dict: an object with prev_sample and pred_original_sample, or the two as a tuple.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not match; a timestep that the
                list does not hold; a generator of another device.
        """
        plan = self._plan
        if plan is None or not plan.fits(self):
            plan = self._new_plan()
        if plan.raises or plan.problem or not (sample.is_cpu or self._runs_on(sample)):
            self._warn(plan.problem)
            arguments = model_output, timestep, sample, generator, return_dict
            return super().step(*arguments)  # type: ignore[misc]
        x_next, x0 = self._advance(
            plan, None, model_output, timestep, sample, generator, None, None
        )
        if not return_dict:
            return x_next, x0
        return DDPMSchedulerOutput(prev_sample=x_next, pred_original_sample=x0)


class FastDDIMScheduler(FastScheduler, DDIMScheduler):
    """DDIMScheduler, each step one kernel: Song et al. 2021, eq. 12. See FastDDPMScheduler.

    >>> from ddpm_fast.integrations.diffusers import FastDDIMScheduler
    >>> scheduler = FastDDIMScheduler()
    >>> scheduler.set_timesteps(50)
    >>> x = torch.zeros(2, 3, 8, 8)
    >>> scheduler.step(torch.ones_like(x), scheduler.timesteps[0], x).prev_sample.shape
    torch.Size([2, 3, 8, 8])
    """

    mixin, stock = FastScheduler, DDIMScheduler

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """As the stock scheduler's; the numbers are kept on the host as well."""
        with torch.inference_mode(False):
            super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._place_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the reverse process, x_{t-1} from x_t.

        Args:
            model_output: [N, C, …], float.
            timestep: a number, a 0-d tensor on any device, or int64 [N]. One on a device is not
                read back.
            sample: [N, C, …], x_t.
            eta: 0 … 1; noise is drawn where it is greater than 0.
            use_clipped_model_output: ε rederived from the clipped x̂₀.
            generator: one, or a list of N.
            variance_noise: the noise itself, in place of a generator.
            return_dict: an object with prev_sample and pred_original_sample, or the two as a tuple.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not match; a timestep outside
                0 … T−1; a generator of another device; no ``set_timesteps`` before.
        """
        plan = self._plan
        if plan is None or not plan.fits(self):
            plan = self._new_plan()
        if plan.raises or plan.problem or not (sample.is_cpu or self._runs_on(sample)):
            self._warn(plan.problem)
            given = model_output, timestep, sample, eta, use_clipped_model_output
            more = generator, variance_noise, return_dict
            return super().step(*given, *more)  # type: ignore[misc]
        key = float(eta), bool(use_clipped_model_output)
        if eta > 0 and variance_noise is not None:
            if generator is not None:
                raise ValueError("give a generator or variance_noise, not both")
            variance_noise = fitted(variance_noise, sample)
        x_next, x0 = self._advance(
            plan, key, model_output, timestep, sample, generator, variance_noise, eta > 0
        )
        if not return_dict:
            return x_next, x0
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=x0)


for _fast in (FastDDPMScheduler, FastDDIMScheduler):
    stands_for(_fast)
    # diffusers writes these two names to disk: what is saved loads where there is no ddpm_fast.
    _fast.__name__, _fast.__module__ = _fast.stock.__name__, _fast.stock.__module__
