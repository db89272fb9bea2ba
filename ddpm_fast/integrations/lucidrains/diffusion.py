"""What stands before lucidrains' GaussianDiffusion once it is accelerated: sampling.

Algorithm 2 of Ho et al. 2020 and eq. 12 of Song et al. 2021, by the tables of tables.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Address
from ..steps import Steps
from .tables import ddim_times
from .training import FLOAT64, UNUSED, FastTraining, drawn

_CLIP = (-1.0, 1.0)
# What p_sample and a step of ddim_sample stand for.
_IN_DDIM = (
    "model_predictions",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)
_IN_STEP = (*_IN_DDIM, "p_mean_variance", "q_posterior")
_IN_LOOP = (*_IN_STEP, "p_sample")


class FastDiffusion(FastTraining):
    """GaussianDiffusion with p_sample, p_sample_loop, ddim_sample, interpolate, q_sample and
    p_losses on the fused kernels: the same results for the same noise, to rounding.

    Where the object has later got its own of the methods that these stand for, the stock method
    calls it, with a warning; sampling then draws torch's numbers.

    Everything else is the stock class's, the state_dict included. No noise is stored, except where
    torch draws it or ``immiscible`` has to compare it with the data; and no states of a trajectory,
    unless ``return_all_timesteps`` asks for them.

    Addressed noise, by stream and index: the initial image 0, 0; a step 1, its timestep; p_losses
    and q_sample 2, 0, their offset noise 5, 0; interpolate's two images 2, 1 and 2, 2. The
    timesteps of ``forward`` and the coin of self-conditioning are drawn as in the stock class.
    """

    # What the stock class has.
    unnormalize: Callable[[Tensor], Tensor]
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float

    @torch.inference_mode()
    def p_sample(
        self, x: Tensor, t: int, x_self_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the clipped x̂₀."""
        if self._has_its_own(_IN_STEP):
            return self._stock("p_sample")(x, t, x_self_cond)
        t = int(t)
        if t == self.num_timesteps - 1:  # of a loop that somebody else has written
            self._tables.look(self._buffers)
        steps = self._tables.ddpm(self._buffers, self.objective)
        return self._step(steps, x, t, x_self_cond, self._address(), noisy=t > 0)

    @torch.inference_mode()
    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Images of ``shape``; [N, T + 1, …] of them with ``return_all_timesteps``."""
        if self._has_its_own(_IN_LOOP):
            return self._stock("p_sample_loop")(shape, return_all_timesteps)
        self._tables.look(self._buffers)
        steps = self._tables.ddpm(self._buffers, self.objective)
        return self._loop(steps, shape, range(self.num_timesteps)[::-1], return_all_timesteps)

    @torch.inference_mode()
    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Images of ``shape`` in ``sampling_timesteps`` steps, [N, steps + 1, …] of them with
        ``return_all_timesteps``."""
        if self._has_its_own(_IN_DDIM):
            return self._stock("ddim_sample")(shape, return_all_timesteps)
        self._tables.look(self._buffers)
        times = ddim_times(self.num_timesteps, self.sampling_timesteps)
        eta = self.ddim_sampling_eta
        steps = self._tables.ddim(self._buffers, self.objective, times, eta)
        return self._loop(steps, shape, times, return_all_timesteps)

    @torch.inference_mode()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """Two images noised to timestep t, mixed, and sampled from there."""
        self._tables.look(self._buffers)
        if not self.noise_source.is_addressed or self._has_its_own((*_IN_LOOP, "q_sample")):
            return self._stock("interpolate")(x1, x2, t, lam)
        assert x1.shape == x2.shape
        t = self.num_timesteps - 1 if t is None else t
        address = self._address()
        times = torch.full((x1.shape[0],), t, device=x1.device)
        first, second = (
            self._noised(x, times, None, address, self._takes(x, times, None), index)
            for index, x in enumerate((x1, x2), 1)  # 0 is of the samples that it trained on
        )
        steps = self._tables.ddpm(self._buffers, self.objective)
        img = (1 - lam) * first + lam * second
        x_start = None
        for time in _progress(range(t)[::-1], "interpolation sample time step"):
            img, x_start = self._step(
                steps, img, time, x_start if self.self_condition else None, address, noisy=time > 0
            )
        return img

    def _stock(self, method: str) -> Any:
        return getattr(super(), method)

    def _loop(
        self, steps: Steps, shape: Sequence[int], times: Sequence[int], all_states: bool
    ) -> Tensor:
        address = self._address()
        img = self._initial(shape, address)
        states = [img] if all_states else []
        x_start: Tensor | None = None
        for time in _progress(times, "sampling loop time step"):
            last = time == times[-1]
            img, x_start = self._step(
                steps,
                img,
                time,
                x_start if self.self_condition else None,
                address,
                noisy=not last,
                wants_x_start=last or self.self_condition,
            )
            if last and steps.table.method == "ddim":
                img = x_start
            if all_states:
                states.append(img)
        return self.unnormalize(torch.stack(states, dim=1) if all_states else img)

    def _step(
        self,
        steps: Steps,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None,
        address: Address,
        noisy: bool,
        wants_x_start: bool = True,
    ) -> tuple[Tensor, Any]:
        """The state after timestep t and, where it is wanted, the clipped x̂₀."""
        betas = self._buffers["betas"]
        times = torch.full((x.shape[0],), t, device=betas.device, dtype=torch.int64)
        output = self.model(x, times, x_self_cond)
        noise = None
        if noisy and not self.noise_source.is_addressed:
            noise = torch.randn_like(x)
        dtype = torch.promote_types(torch.promote_types(x.dtype, output.dtype), betas.dtype)
        if x.dtype != dtype:
            x = x.to(dtype)
        if dtype == torch.float64:
            self._tables.warn_once(FLOAT64)
        img, x_start = steps.take(
            x, output, t, address, clip=_CLIP, noise=noise, return_x0=wants_x_start
        )
        if self.objective == "pred_x0" and x_start is not None:
            x_start = x_start.to(output.dtype)
        return img, x_start

    def _initial(self, shape: Sequence[int], address: Address) -> Tensor:
        if not self.noise_source.is_addressed:
            return torch.randn(shape, device=self.device)
        return drawn(shape, address, torch.get_default_dtype(), self.device, stream=0)

    def _address(self) -> Address:
        """Of all draws of one trajectory."""
        if not self.noise_source.is_addressed:
            return UNUSED
        return self.noise_source.of_trajectory(self.device)


def _progress(times: Sequence[int], what: str) -> Iterable[int]:
    from tqdm.auto import tqdm  # as the stock class does

    bar: Iterable[int] = tqdm(times, desc=what, total=len(times))
    return bar
