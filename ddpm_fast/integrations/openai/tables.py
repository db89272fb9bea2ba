"""What follows from the arrays of OpenAI's GaussianDiffusion: its samplers as rows of a table.

Their numbers are float64 arrays; a step gathers those it needs, rounds them to float32 and computes
in the dtype that float32 and the state promote to. The rows here are made of the same roundings.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import vlb_table
from ...schedule import NoiseSchedule, Prediction, Variance
from ..steps import Steps

# Members of their enumerations, by name: every copy of the code has its own.
PREDICTIONS: dict[str, Prediction | None] = {
    "EPSILON": "epsilon",
    "START_X": "sample",
    "PREVIOUS_X": None,
}
VARIANCES: dict[str, Variance] = {
    "LEARNED": "learned",
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
    "LEARNED_RANGE": "learned_range",
}
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
ARRAYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_KEPT_ETAS = 16

# What an object's tables follow from, for comparing by identity.
made_of = attrgetter("model_mean_type", "model_var_type", "loss_type", *ARRAYS)


class Tables:
    """Of one object.

    Attributes:
        prediction: of its model; None where that predicts x_{t−1} (PREVIOUS_X).
        variance: of its model.
        loss: the name of its loss.
        schedule: its betas'.
        made_of: the object's enumeration members and arrays, themselves.
        is_of_betas: whether the arrays of the losses are those that follow from the betas.
        no_bound: why the kernels do not serve terms of the bound; None where they do.
        steps: of p_sample.

    Raises:
        TypeError: a member of an enumeration, or an array, that OpenAI's code does not have.
        ValueError: betas that NoiseSchedule refuses.
    """

    def __init__(self, diffusion: Any) -> None:
        mean = _member(diffusion, "model_mean_type", PREDICTIONS)
        self.prediction = PREDICTIONS[mean]
        self.variance = VARIANCES[_member(diffusion, "model_var_type", VARIANCES)]
        self.loss = _member(diffusion, "loss_type", LOSSES)
        self._arrays = {name: _array(diffusion, name) for name in ARRAYS}
        self.made_of = made_of(diffusion)
        self.schedule = NoiseSchedule(self._arrays["betas"])
        self._on_devices: dict[tuple[str, torch.device], Tensor] = {}
        self._ddim: dict[tuple[float, bool], Steps] = {}
        self._ddim_reverse: dict[bool, Steps] = {}
        with np.errstate(all="ignore"):  # where ᾱ is 0, their code has its infinities, too
            self._columns = self._derived()
            self.steps = self._ancestral()
            self.is_of_betas = self._follows_from_betas()
        self.no_bound = self._why_no_bound()

    def __len__(self) -> int:
        return len(self.schedule)

    @property
    def halves(self) -> int:
        """How many times x's channels the model returns."""
        return 2 if self.variance.startswith("learned") else 1

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A float32 column at each sample's timestep, to meet ``like``'s dimensions."""
        column = self._on_devices.get((name, t.device))
        if column is None:
            with torch.inference_mode(False):
                column = self._columns[name].to(t.device)
            self._on_devices[name, t.device] = column
        return column[t].reshape(-1, *[1] * (like.ndim - 1))

    def x0(self, x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        """x̂₀ of the mean part of a model's output, before denoised_fn and the clip."""
        if self.prediction == "sample":
            return m
        return self.at("x0_of_x", t, x) * x + self.at("x0_of_m", t, x) * m

    def model_variance(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """σ² of p_θ(x_{t−1} | x_t), of x's shape."""
        if self.halves == 1:
            return self.at("variance", t, x).expand_as(x)
        v = output[:, x.shape[1] :]
        if self.variance == "learned":
            return v.exp()
        share = (v + 1) / 2
        low, high = self.at("log_variance_min", t, x), self.at("log_variance_max", t, x)
        return (share * high + (1 - share) * low).exp()

    def _float32(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name]).float()

    def _derived(self) -> dict[str, Tensor]:
        coef1, coef2 = self._arrays["posterior_mean_coef1"], self._arrays["posterior_mean_coef2"]
        columns = {
            "log_variance_min": self._float32("posterior_log_variance_clipped"),
            "log_variance_max": torch.from_numpy(np.log(self._arrays["betas"])).float(),
        }
        if self.prediction is None:
            columns["x0_of_x"] = torch.from_numpy(-coef2 / coef1).float()
            columns["x0_of_m"] = torch.from_numpy(1.0 / coef1).float()
        else:
            columns["x0_of_x"] = self._float32("sqrt_recip_alphas_cumprod")
            columns["x0_of_m"] = -self._float32("sqrt_recipm1_alphas_cumprod")
        variance, log_variance = self._arrays["posterior_variance"], None
        if self.variance == "fixed_large":
            variance = np.append(variance[1:2], self._arrays["betas"][1:])
            log_variance = torch.from_numpy(np.log(variance)).float()
        columns["variance"] = torch.from_numpy(variance).float()
        columns["log_variance"] = (
            columns["log_variance_min"] if log_variance is None else log_variance
        )
        return columns

    def _to_x0(self) -> dict[str, Any]:
        """r, c_x, c_m: the form of the table keeps x̂₀'s two terms apart until they are added."""
        of_x, of_m = (self._columns[name].double() for name in ("x0_of_x", "x0_of_m"))
        one, zero = torch.ones_like(of_x), torch.zeros_like(of_x)
        if self.prediction == "sample":
            return {"r": one, "c_x": zero, "c_m": one}
        if self.prediction is None:
            return {"r": of_m, "c_x": of_x / of_m, "c_m": one}
        ratio = torch.where(of_x.isinf(), -one, of_m / of_x)
        return {"r": of_x, "c_x": one, "c_m": ratio}

    def _ancestral(self) -> Steps:
        """Of p_sample: the posterior's mean (Ho et al. 2020, eq. 7), or what the model says."""
        zero = torch.zeros(len(self))
        mean: dict[str, Any] = {
            "b_0": self._float32("posterior_mean_coef1"),
            "b_x": self._float32("posterior_mean_coef2"),
            "b_m": zero,
        }
        if self.prediction is None:
            mean = {"b_0": zero, "b_x": zero, "b_m": zero + 1}
        sigma = torch.exp(0.5 * self._columns["log_variance"])
        sigma = torch.ones_like(sigma) if self.halves == 2 else sigma
        sigma[0] = 0.0
        return Steps.of(
            **self._to_x0(),
            **mean,
            sigma=sigma,
            log_variance_min=self._columns["log_variance_min"],
            log_variance_max=self._columns["log_variance_max"],
            prediction=self.prediction or "epsilon",
            variance=self.variance,
        )

    def ddim(self, eta: float, from_x0: bool) -> Steps:
        """Of ddim_sample (Song et al. 2021, eq. 12), in float32 as it computes them.

        from_x0: the model's output is x̂₀ itself, of x's channels.
        """
        steps = self._ddim.get((eta, from_x0))
        if steps is None:
            bar, prev = self._float32("alphas_cumprod"), self._float32("alphas_cumprod_prev")
            sigma = eta * torch.sqrt((1 - prev) / (1 - bar)) * torch.sqrt(1 - bar / prev)
            weight = torch.sqrt(1 - prev - sigma**2)
            sigma[0] = 0.0
            steps = self._along_eps(torch.sqrt(prev), weight, sigma, from_x0)
            if len(self._ddim) >= _KEPT_ETAS:
                self._ddim.clear()
            self._ddim[eta, from_x0] = steps
        return steps

    def ddim_reverse(self, from_x0: bool) -> Steps:
        """Of ddim_reverse_sample, x_{t+1} of x_t."""
        steps = self._ddim_reverse.get(from_x0)
        if steps is None:
            after = self._float32("alphas_cumprod_next")
            still = torch.zeros_like(after)
            steps = self._along_eps(torch.sqrt(after), torch.sqrt(1 - after), still, from_x0)
            self._ddim_reverse[from_x0] = steps
        return steps

    def _along_eps(self, of_x0: Tensor, of_eps: Tensor, sigma: Tensor, from_x0: bool) -> Steps:
        """of_x0 x̂₀ + of_eps ε + σ z, where ε = (√(1/ᾱ) x − x̂₀)/√(1/ᾱ − 1)."""
        recip = self._float32("sqrt_recip_alphas_cumprod").double()
        k = of_eps.double() / self._float32("sqrt_recipm1_alphas_cumprod").double()
        return Steps.of(
            **self._to_x0(),
            b_0=of_x0.double() - k,
            b_x=k * recip,
            b_m=torch.zeros(1),
            sigma=sigma,
            prediction=self.prediction or "epsilon",
            variance="fixed_small" if from_x0 else self.variance,
            method="ddim",
        )

    def _follows_from_betas(self) -> bool:
        betas = self._arrays["betas"]
        bar = np.cumprod(1 - betas)
        before = np.append(1.0, bar[:-1])
        variance = betas * (1 - before) / (1 - bar)
        expected = {
            "sqrt_alphas_cumprod": np.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.append(variance[1:2], variance[1:])),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
            "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
        }
        return all(
            np.allclose(self._arrays[name], values, rtol=1e-4, atol=0, equal_nan=True)
            for name, values in expected.items()
        )

    def _why_no_bound(self) -> str | None:
        if not self.is_of_betas:
            return "the arrays are not those that follow from the betas"
        if self.prediction is None:
            return "the model predicts x_{t-1} (PREVIOUS_X)"
        try:
            vlb_table.vlb_rows(self.schedule, self.prediction, self.variance, torch.device("cpu"))
        except ValueError as error:
            return str(error)
        return None


def _member(diffusion: Any, attribute: str, known: Any) -> str:
    member = getattr(diffusion, attribute, None)
    name = getattr(member, "name", None)
    if name not in known:
        raise TypeError(f"{attribute} must be one of {', '.join(known)}; got {member!r}")
    return str(name)


def _array(diffusion: Any, name: str) -> np.ndarray:
    array = getattr(diffusion, name, None)
    steps = len(diffusion.betas)
    if not isinstance(array, np.ndarray) or array.shape != (steps,):
        shape = getattr(array, "shape", None)
        raise TypeError(
            f"{name} must be a numpy array of {steps} numbers; got {type(array).__name__}"
            + ("" if shape is None else f" {list(shape)}")
        )
    return array.astype(np.float64)
