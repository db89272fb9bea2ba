"""OpenAI's sampling loops and steps, each step by one kernel after the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops import randn
from ...ops.checks import indexed
from ...ops.reverse_step_run import STREAM
from ...progress import bar
from ..noise import Address
from ..steps import Steps
from .calls import STOCK_NAMES, AcceleratedDiffusion, Choices
from .tables import Tables

Step = Callable[..., dict[str, Tensor]]


class FastSampling(AcceleratedDiffusion):
    """In the place of GaussianDiffusion's methods of the same names, which take the same
    arguments: what their docstrings say holds here."""

    def p_sample(
        self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """x_{t−1} and x̂₀ by the model's p_θ (Ho et al. 2020, eq. 11)."""
        choices = self._choices("p_sample", args, kwargs)
        if self._has_own("p_sample"):
            return self._by_stock("p_sample", choices, model, x, t)
        address = self._address(len(x), x.device)
        return self._p_step(self._wrap_model(model), x, t, None, address, choices)

    def ddim_sample(
        self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """x_{t−1} and x̂₀ by DDIM (Song et al. 2021, eq. 12)."""
        choices = self._choices("ddim_sample", args, kwargs)
        if self._has_own("ddim_sample"):
            return self._by_stock("ddim_sample", choices, model, x, t)
        address = self._address(len(x), x.device)
        return self._ddim_step(self._wrap_model(model), x, t, None, address, choices)

    def ddim_reverse_sample(
        self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """x_{t+1} and x̂₀ by DDIM's deterministic path, taken backwards."""
        choices = self._choices("ddim_reverse_sample", args, kwargs)
        if choices.eta != 0.0:
            raise ValueError(f"ddim_reverse_sample's path is that of eta = 0; got {choices.eta}")
        if self._has_own("ddim_reverse_sample"):
            return self._by_stock("ddim_reverse_sample", choices, model, x, t)
        steps, model = Tables.ddim_reverse, self._wrap_model(model)
        return self._along_eps(steps, model, x, t, None, (0, None), choices, draws=False)

    def p_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Samples of ``shape``."""
        choices = self._choices("p_sample_loop", args, kwargs)
        if self._has_own("p_sample_loop"):
            return self._loop_by_stock("p_sample_loop", choices, model, shape)
        return _last(self._trajectory(self._p_step, model, shape, choices, samples_only=True))

    def p_sample_loop_progressive(
        self, model: Any, shape: Any, *args: Any, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """What p_sample returns at each step; what is changed in it is what goes on."""
        choices = self._choices("p_sample_loop_progressive", args, kwargs)
        if self._has_own("p_sample_loop_progressive"):
            return self._loop_by_stock("p_sample_loop_progressive", choices, model, shape)
        return self._trajectory(self._p_step, model, shape, choices)

    def ddim_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Samples of ``shape``."""
        choices = self._choices("ddim_sample_loop", args, kwargs)
        if self._has_own("ddim_sample_loop"):
            return self._loop_by_stock("ddim_sample_loop", choices, model, shape)
        return _last(self._trajectory(self._ddim_step, model, shape, choices, samples_only=True))

    def ddim_sample_loop_progressive(
        self, model: Any, shape: Any, *args: Any, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """What ddim_sample returns at each step; what is changed in it is what goes on."""
        choices = self._choices("ddim_sample_loop_progressive", args, kwargs)
        if self._has_own("ddim_sample_loop_progressive"):
            return self._loop_by_stock("ddim_sample_loop_progressive", choices, model, shape)
        return self._trajectory(self._ddim_step, model, shape, choices)

    def _trajectory(
        self, step: Step, model: Any, shape: Any, choices: Choices, samples_only: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        device = _device_of(model, shape, choices)
        address = self._address(shape[0], device)
        x = choices.noise
        x = self._first(shape, address, device) if x is None else x
        model, num_steps = self._wrap_model(model), self.num_timesteps
        with bar(choices.progress, num_steps, "sampling", unit="step") as shown:
            for i in reversed(range(num_steps)):
                t = torch.full((shape[0],), i, dtype=torch.int64, device=device)
                with torch.no_grad():
                    out = step(model, x, t, i, address, choices, not samples_only)
                shown.update()
                yield out
                x = out["sample"]

    def _first(self, shape: Any, address: Address, device: torch.device) -> Tensor:
        """x_T."""
        if not self.noise_source.is_addressed:
            return torch.randn(*shape, device=device)
        x = randn(shape, seed=address[0], sample_ids=address[1], device=device)
        return x.to(torch.get_default_dtype())  # torch.randn's

    def _by_stock(self, method: str, choices: Choices, *first: Any) -> Any:
        """What the stock method makes of these arguments."""
        return getattr(super(), method)(*first, **self._given(method, choices))

    def _loop_by_stock(self, method: str, choices: Choices, model: Any, shape: Any) -> Any:
        """From the x_T that the noise's source has."""
        if choices.noise is None and self.noise_source.is_addressed:
            device = _device_of(model, shape, choices)
            x = self._first(shape, self._address(shape[0], device), device)
            choices = choices._replace(noise=x)
        return self._by_stock(method, choices, model, shape)

    # Steps of checked arguments: t is int64 [N], at the same as an int where it is one for all

    def _drawn(self, x: Tensor) -> Tensor | None:
        """z of torch's generator, None where the kernel draws."""
        return None if self.noise_source.is_addressed else torch.randn_like(x)

    def _p_step(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        at: int | None,
        address: Address,
        choices: Choices,
        return_x0: bool = True,
    ) -> dict[str, Tensor]:
        cond_fn, tables = choices.cond_fn, self._tables
        if cond_fn is not None and not self._adds_to_the_mean(x):
            return self._p_step_with_mean(model, x, t, address, choices)
        output = self._model_output(tables, model, x, t, choices.kwargs)
        state = x if x.dtype == torch.float64 else x.float()
        x0 = None
        if choices.denoised_fn is not None:
            x0 = choices.denoised_fn(tables.x0(state, output[:, : x.shape[1]], t))
        noise = self._drawn(x)
        sample, x0_hat = tables.steps.take(
            state,
            output,
            t.long() if at is None else at,
            address,
            clip=choices.clip,
            noise=noise,
            x0=x0 if x0 is None else x0.to(state.dtype),
            return_x0=return_x0,
        )
        if cond_fn is not None:
            # The mean's own term for cond_fn is added to it; so it may be to the sample.
            out = {"mean": sample, "variance": tables.model_variance(x, output, t)}
            sample = self._conditioned("mean", out, x, t, choices)["mean"]
        return {"sample": sample, "pred_xstart": x0_hat}

    def _p_step_with_mean(
        self, model: Any, x: Tensor, t: Tensor, address: Address, choices: Choices
    ) -> dict[str, Tensor]:
        """For a condition_mean that does more than add, and for float64, which it makes float32."""
        stock: Any = self
        out = stock.p_mean_variance(model, x, t, **choices.of_mean_variance)
        noise = self._drawn(x)
        if noise is None:
            seed, ids = address
            place: dict[str, Any] = {"stream": STREAM, "index": t.long(), "device": x.device}
            noise = randn(x.shape, seed=seed, sample_ids=ids, **place).to(x.dtype)
        out = self._conditioned("mean", out, x, t, choices)
        moves = (t != 0).float().reshape(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + moves * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def _adds_to_the_mean(self, x: Tensor) -> bool:
        return x.dtype != torch.float64 and not self._overrides("condition_mean")

    def _conditioned(
        self, what: str, out: dict[str, Tensor], x: Tensor, t: Tensor, choices: Choices
    ) -> dict[str, Tensor]:
        stock: Any = self
        if what == "mean":
            arguments = (choices.cond_fn, out, x, t)
            mean = stock.condition_mean(*arguments, model_kwargs=choices.kwargs)
            return {**out, "mean": mean}
        return stock.condition_score(choices.cond_fn, out, x, t, model_kwargs=choices.kwargs)

    def _ddim_step(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        at: int | None,
        address: Address,
        choices: Choices,
        return_x0: bool = True,
    ) -> dict[str, Tensor]:
        def steps(tables: Tables, from_x0: bool) -> Steps:
            return tables.ddim(choices.eta, from_x0)

        return self._along_eps(steps, model, x, t, at, address, choices, True, return_x0)

    def _along_eps(
        self,
        steps: Callable[[Tables, bool], Steps],
        model: Any,
        x: Tensor,
        t: Tensor,
        at: int | None,
        address: Address,
        choices: Choices,
        draws: bool,
        return_x0: bool = True,
    ) -> dict[str, Tensor]:
        """A step that rederives ε from x̂₀."""
        state, x0, clip = x if x.dtype == torch.float64 else x.float(), None, choices.clip
        tables = self._tables
        if choices.cond_fn is not None:
            stock: Any = self
            out = stock.p_mean_variance(model, x, t, **choices.of_mean_variance)
            x0 = self._conditioned("score", out, x, t, choices)["pred_xstart"]
            output, clip = x0, None  # what comes of the score is not clipped again
        else:
            output = self._model_output(tables, model, x, t, choices.kwargs)
            if choices.denoised_fn is not None:
                m = output[:, : x.shape[1]]
                x0 = choices.denoised_fn(tables.x0(state, m, t))
        sample, x0_hat = steps(tables, choices.cond_fn is not None).take(
            state,
            output,
            t.long() if at is None else at,
            address,
            clip=clip,
            noise=self._drawn(x) if draws else None,
            x0=x0 if x0 is None else x0.to(state.dtype),
            return_x0=return_x0,
        )
        return {"sample": sample, "pred_xstart": x0_hat}

    def _overrides(self, method: str) -> bool:
        """Whether a class of the user's own has it, or the object itself."""
        if method in self.__dict__:
            return True
        owner = next(c for c in type(self).__mro__ if method in vars(c))
        return owner.__name__ not in STOCK_NAMES


def _device_of(model: Any, shape: Any, choices: Choices) -> torch.device:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple or a list; got {type(shape).__name__}")
    if choices.device is None:
        return next(model.parameters()).device
    return indexed(choices.device)


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]  # one at a time, so that none but the last is kept
    return sample
