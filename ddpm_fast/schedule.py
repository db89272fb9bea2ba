"""Noise schedules and the tables that turn them into samplers.

A schedule is computed in float64 and keeps the field's names; a :class:`StepTable` is what the
kernels read: one row of nine float32 numbers a step, rounded once, at the end.

Sources: Ho, Jain & Abbeel 2020 (DDPM); Nichol & Dhariwal 2021 (improved DDPM); Song, Meng & Ermon
2021 (DDIM); Salimans & Ho 2022 (v prediction); Lin et al. 2023 (zero terminal SNR).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .step_table import MAX_NUM_STEPS as MAX_NUM_STEPS
from .step_table import Method as Method
from .step_table import ModelVariance as ModelVariance
from .step_table import Prediction as Prediction
from .step_table import StepTable as StepTable
from .step_table import Variance as Variance

Spacing = Literal["leading", "trailing", "linspace"]
EpsSource = Literal["x0", "model"]


def one_of(name: str, value: object, choices: object) -> None:
    """Raises ValueError unless ``value`` is one of the literal type's strings."""
    accepted = get_args(choices)
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def integer(name: str, value: object) -> int:
    """``value`` as an int, numpy's integers included; raises TypeError for anything else."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer; got {value!r} ({type(value).__name__})")


class NoiseSchedule:
    """The betas of a forward process q(x_t | x_{t-1}) and all that follows from them.

    Timesteps run 0 … T-1 (the papers' t is t + 1). All attributes are float64 [T] on the CPU.

    Args:
        betas: [T] numbers in (0, 1]; 1 only as the last.

    Attributes:
        betas, alphas: β and α = 1 − β.
        alphas_cumprod, alphas_cumprod_prev, one_minus_alphas_cumprod: ᾱ, Ho et al. 2020, eq. 4; the
            ᾱ before it, 1 at t = 0; 1 − ᾱ, without cancellation.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: √ᾱ and √(1−ᾱ).
        sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod: √(1/ᾱ) and √(1/ᾱ − 1).
        posterior_mean_coef1 (of x_0), posterior_mean_coef2 (of x_t), posterior_variance: eq. 7.
        posterior_log_variance_clipped: its logarithm, where t = 0 takes t = 1's value.
        snr: ᾱ / (1 − ᾱ), Kingma et al. 2021, eq. 2.

    Raises:
        ValueError: betas that are empty, not one-dimensional, not finite, or out of range.

    >>> NoiseSchedule.linear().alphas_cumprod[-1].item()  # doctest: +ELLIPSIS
    4.03582...e-05
    """

    @torch.inference_mode(False)  # so that autograd may save the tables wherever they were made
    def __init__(self, betas: Tensor | np.ndarray | Sequence[float]) -> None:
        b = _as_float64(betas)
        if b.ndim != 1 or b.numel() == 0:
            raise ValueError(f"betas must be one-dimensional and not empty; got {list(b.shape)}")
        if b.numel() > MAX_NUM_STEPS:
            raise ValueError(f"betas must be at most 2^24; got {b.numel()}")
        if not bool(((b > 0) & (b <= 1)).all()):
            t = int((~((b > 0) & (b <= 1))).nonzero()[0])
            raise ValueError(f"betas must lie in (0, 1]; betas[{t}] is {b[t].item()}")
        if bool((b[:-1] == 1).any()):
            t = int((b[:-1] == 1).nonzero()[0])
            raise ValueError(f"betas may reach 1 only at the last step; betas[{t}] is 1")

        self.betas = b
        self.alphas = 1 - b
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)
        self.alphas_cumprod_prev = torch.cat([b.new_ones(1), self.alphas_cumprod[:-1]])
        self._log_alphas_cumprod = torch.log1p(-b).cumsum(0)
        self.one_minus_alphas_cumprod = _one_minus_cumprod(b)
        one_minus_prev = torch.cat([b.new_zeros(1), self.one_minus_alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = self.one_minus_alphas_cumprod.sqrt()
        self.sqrt_recip_alphas_cumprod = self.alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (
            self.one_minus_alphas_cumprod / self.alphas_cumprod
        ).sqrt()
        self.snr = self.alphas_cumprod / self.one_minus_alphas_cumprod
        self.posterior_mean_coef1 = (
            self.alphas_cumprod_prev.sqrt() * b / self.one_minus_alphas_cumprod
        )
        self.posterior_mean_coef2 = (
            self.alphas.sqrt() * one_minus_prev / self.one_minus_alphas_cumprod
        )
        self.posterior_variance = b * one_minus_prev / self.one_minus_alphas_cumprod
        self.posterior_log_variance_clipped = _log_with_first_replaced(self.posterior_variance, b)
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return self.betas.shape[0]

    def __repr__(self) -> str:
        return f"NoiseSchedule(num_steps={len(self)}, terminal_snr={self.snr[-1].item():.3g})"

    # Named schedules -----------------------------------------------------------------------

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Evenly spaced betas (Ho et al. 2020, section 4), not rescaled by 1000 / T."""
        return cls(np.linspace(beta_start, beta_end, _positive(num_steps)))

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced (latent diffusion)."""
        return cls(np.linspace(beta_start**0.5, beta_end**0.5, _positive(num_steps)) ** 2)

    @classmethod
    def quadratic(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """The same form as :meth:`scaled_linear`, with the DDPM code's end points."""
        return cls.scaled_linear(num_steps, beta_start, beta_end)

    @classmethod
    def constant(cls, num_steps: int = 1000, beta: float = 0.02) -> NoiseSchedule:
        """The same beta at every step."""
        return cls(np.full(_positive(num_steps), beta))

    @classmethod
    def jsd(cls, num_steps: int = 1000) -> NoiseSchedule:
        """beta = 1/T, 1/(T-1), …, 1 (Sohl-Dickstein et al. 2015): the last ᾱ is 0."""
        return cls(1 / np.linspace(_positive(num_steps), 1, num_steps))

    @classmethod
    def sigmoid(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas along the logistic function from -6 to 6."""
        x = np.linspace(-6, 6, _positive(num_steps))
        return cls(beta_start + (beta_end - beta_start) / (1 + np.exp(-x)))

    @classmethod
    def cosine(
        cls, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """ᾱ(t) = cos²((t/T + s)/(1 + s) · π/2), betas at most ``max_beta``.

        Nichol & Dhariwal 2021, eq. 17.
        """
        u = (np.arange(_positive(num_steps) + 1) / num_steps + s) / (1 + s) * (math.pi / 2)
        # 1 - cos²(b)/cos²(a) = sin(b - a) sin(b + a) / cos²(a), without the cancellation.
        betas = np.sin(u[1:] - u[:-1]) * np.sin(u[1:] + u[:-1]) / np.cos(u[:-1]) ** 2
        return cls(np.minimum(betas, max_beta))

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule shifted and scaled so that the last ᾱ is 0 and the first is kept.

        Lin et al. 2023, algorithm 1. T = 1 leaves only beta = 1. Such a schedule needs the
        "sample" or "v_prediction" model: at ᾱ = 0 the noise says nothing of x_0.
        """
        root = self.sqrt_alphas_cumprod
        if len(self) == 1:
            return NoiseSchedule([1.0])
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = root**2
        alphas = torch.cat([self.alphas[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        return NoiseSchedule(1 - alphas)

    # Tables --------------------------------------------------------------------------------

    def forward_weights(self, device: torch.device) -> Tensor:
        """float32 [T, 2] on ``device``: sqrt(ᾱ), sqrt(1 - ᾱ) (Ho et al. 2020, eq. 4)."""
        return self.table_on(
            device,
            "forward",
            lambda: torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], 1),
        )

    def table_on(self, device: torch.device, name: str, columns: Callable[[], Tensor]) -> Tensor:
        """A kernel's table: ``columns()``, float64 on the CPU, rounded to float32 on ``device``.
        Made once for a name and device, and kept."""
        table = self._tables.get((name, device))
        if table is None:
            with torch.inference_mode(False):
                table = columns().float().contiguous().to(device)
            if type(table) is Tensor:  # not what stands for one while a function is traced
                self._tables[name, device] = table
        return table

    def spaced_timesteps(
        self,
        num_steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        spacing: Spacing = "leading",
    ) -> list[int]:
        """The timesteps of a trajectory, strictly decreasing.

        Args:
            num_steps: n, 1 … T; all T if None.
            timesteps: an explicit list instead.
            spacing: "leading" i·(T//n), "trailing" round(T − i·T/n) − 1, "linspace" n points from
                T − 1 to 0, rounded. With n = 1 they give 0, T − 1 and 0.

        Raises:
            ValueError: both lists given, a number out of range, an order that does not decrease.
        """
        one_of("spacing", spacing, Spacing)
        total = len(self)
        if timesteps is not None:
            if num_steps is not None:
                raise ValueError("give num_steps or timesteps, not both")
            steps = [integer("timesteps", t) for t in _iterable("timesteps", timesteps)]
            if not steps:
                raise ValueError("timesteps must not be empty")
            if any(a <= b for a, b in itertools.pairwise(steps)):
                raise ValueError(f"timesteps must strictly decrease; got {_shortened(steps)}")
            if steps[0] >= total or steps[-1] < 0:
                raise ValueError(
                    f"timesteps must lie in 0 … {total - 1}; got {steps[0]} … {steps[-1]}"
                )
            return steps
        n = total if num_steps is None else integer("num_steps", num_steps)
        if not 1 <= n <= total:
            raise ValueError(f"num_steps must be an integer in 1 … {total}; got {num_steps!r}")
        i = np.arange(n)
        if spacing == "leading":
            ascending = i * (total // n)
        elif spacing == "trailing":
            ascending = (np.round(total - i * (total / n)) - 1)[::-1]
        else:
            ascending = np.round(np.linspace(0, total - 1, n))
        return [int(t) for t in ascending[::-1]]

    @torch.inference_mode(False)
    def step_table(
        self,
        *,
        prediction: Prediction,
        variance: Variance,
        method: Method = "ddpm",
        eta: float = 0.0,
        num_steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        spacing: Spacing = "leading",
        eps_source: EpsSource = "x0",
    ) -> StepTable:
        """The rows of a sampler: this schedule, a trajectory and a method.

        Args:
            prediction: what the model returns: "epsilon", "sample" (x_0) or "v_prediction"
                (v = √ᾱ ε − √(1−ᾱ) x_0).
            variance: of "ddpm": "fixed_small" β̃, "fixed_large" β, "learned" (the model's second
                half of channels is log σ²) or "learned_range" (it lies between log β̃ and log β,
                Nichol & Dhariwal 2021, eq. 15). "ddim" takes no notice of that half.
            method: "ddpm" (Ho et al. 2020, eqs. 6, 7) or "ddim" (Song et al. 2021, eq. 12).
            eta: 0 … 1, of "ddim": 0 is deterministic.
            num_steps, timesteps, spacing: the trajectory, see :meth:`spaced_timesteps`.
            eps_source: of "ddim": "x0" rederives ε from the clipped x̂₀, "model" takes the model's
                own.

        Returns:
            StepTable on the CPU; its last row has sigma = 0.

        Raises:
            TypeError, ValueError: an unknown name, eta out of range, a trajectory out of range, or
                epsilon prediction at a step where ᾱ is 0 or too small for float32 rows.
        """
        one_of("prediction", prediction, Prediction)
        one_of("variance", variance, Variance)
        one_of("method", method, Method)
        one_of("eps_source", eps_source, EpsSource)
        if not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie in 0 … 1; got {eta}")
        if method == "ddpm" and (eta != 0.0 or eps_source != "x0"):
            raise ValueError("eta and eps_source belong to method='ddim'")

        steps = self.spaced_timesteps(num_steps, timesteps, spacing)
        t = torch.tensor(steps, device="cpu")
        step = _Trajectory.of(self, t)
        if prediction == "epsilon" and bool((step.ac == 0).any()):
            raise ValueError(
                f"prediction='epsilon' has no x_0 at timestep {steps[0]}, where alphas_cumprod is "
                "0: use 'v_prediction' or 'sample', or a trajectory that starts below it"
            )

        zero, one = torch.zeros_like(step.ac), torch.ones_like(step.ac)
        to_x0 = {
            "epsilon": (step.ac.rsqrt(), one, -step.one_minus.sqrt()),
            "sample": (one, zero, one),
            "v_prediction": (one, step.ac.sqrt(), -step.one_minus.sqrt()),
        }[prediction]
        if method == "ddpm":
            to_prev = self._ddpm_columns(step, variance)
        else:
            to_prev = self._ddim_columns(step, prediction, eta, eps_source)
        posterior_log_variance = _log_with_last_replaced(step.posterior_variance, step.beta)
        rows = torch.stack([*to_x0, *to_prev, posterior_log_variance, step.beta.log()], 1)
        rows[-1, 6] = 0.0
        rows = rows.float().contiguous()
        if not bool(rows.isfinite().all()):
            row = int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"the step at timestep {steps[row]} has no float32 form: alphas_cumprod is "
                f"{step.ac[row].item():.3g} there; take smaller betas, another prediction, or a "
                "trajectory that starts below it"
            )
        return StepTable(rows, t, prediction, variance, method)

    @staticmethod
    def _ddpm_columns(step: _Trajectory, variance: Variance) -> tuple[Tensor, ...]:
        """b_0, b_x, b_m, sigma of the posterior q(x_prev | x_t, x_0): Ho et al. 2020, eq. 7."""
        coef1 = step.ac_prev.sqrt() * step.beta / step.one_minus
        coef2 = step.alpha.sqrt() * step.one_minus_prev / step.one_minus
        sigma = {
            "fixed_small": step.posterior_variance.sqrt(),
            "fixed_large": step.beta.sqrt(),
            "learned": torch.ones_like(step.ac),
            "learned_range": torch.ones_like(step.ac),
        }[variance]
        return coef1, coef2, torch.zeros_like(step.ac), sigma

    @staticmethod
    def _ddim_columns(
        step: _Trajectory, prediction: Prediction, eta: float, eps_source: EpsSource
    ) -> tuple[Tensor, ...]:
        """b_0, b_x, b_m, sigma of √ᾱ′ x̂₀ + √(1−ᾱ′−σ²) ε + σ z: Song et al. 2021, eq. 12."""
        variance = (step.one_minus_prev / step.one_minus) * step.beta  # 1 − ᾱ/ᾱ′ = β
        sigma = eta * variance.sqrt()
        weight = (step.one_minus_prev - sigma**2).clamp(min=0).sqrt()  # of ε
        zero = torch.zeros_like(weight)
        if eps_source == "x0":  # ε = (x − √ᾱ x̂₀)/√(1−ᾱ)
            k = weight / step.one_minus.sqrt()
            return step.ac_prev.sqrt() - step.ac.sqrt() * k, k, zero, sigma
        of_x, of_m = {
            "epsilon": (zero, weight),
            "sample": (
                weight / step.one_minus.sqrt(),
                -weight * step.ac.sqrt() / step.one_minus.sqrt(),
            ),
            "v_prediction": (weight * step.one_minus.sqrt(), weight * step.ac.sqrt()),
        }[prediction]
        return step.ac_prev.sqrt(), of_x, of_m, sigma


@dataclass(frozen=True)
class _Trajectory:
    """The schedule seen along a list of timesteps: ᾱ′ belongs to the next, and is 1 after the last.

    ᾱ/ᾱ′ and β = 1 − ᾱ/ᾱ′ come from sums of log α, which keep their digits where ᾱ is near 1 or 0.
    """

    ac: Tensor
    ac_prev: Tensor
    one_minus: Tensor
    one_minus_prev: Tensor
    log_alpha: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, t: Tensor) -> _Trajectory:
        ac, one_minus = schedule.alphas_cumprod[t], schedule.one_minus_alphas_cumprod[t]
        log_ac = schedule._log_alphas_cumprod[t]
        return cls(
            ac=ac,
            ac_prev=torch.cat([ac[1:], ac.new_ones(1)]),
            one_minus=one_minus,
            one_minus_prev=torch.cat([one_minus[1:], one_minus.new_zeros(1)]),
            log_alpha=log_ac - torch.cat([log_ac[1:], log_ac.new_zeros(1)]),
        )

    @property
    def beta(self) -> Tensor:
        return -torch.expm1(self.log_alpha)

    @property
    def alpha(self) -> Tensor:
        return self.log_alpha.exp()

    @property
    def posterior_variance(self) -> Tensor:
        return self.beta * self.one_minus_prev / self.one_minus


def _one_minus_cumprod(betas: Tensor) -> Tensor:
    """1 − ᾱ by (1 − ᾱ_t) = (1 − ᾱ_{t−1}) α_t + β_t: a sum of positive terms, nothing cancels."""
    out, value = np.empty(len(betas)), 0.0
    for t, beta in enumerate(betas.tolist()):
        value = value * (1 - beta) + beta
        out[t] = value
    return torch.from_numpy(out)


def _log_with_first_replaced(variance: Tensor, betas: Tensor) -> Tensor:
    """log β̃, whose first value is log 0: the second stands in, or log β₀ where there is none."""
    first = variance[1:2] if len(variance) > 1 else betas[:1]
    return torch.cat([first, variance[1:]]).log()


def _log_with_last_replaced(variance: Tensor, betas: Tensor) -> Tensor:
    return _log_with_first_replaced(variance.flip(0), betas.flip(0)).flip(0)


def _positive(num_steps: int) -> int:
    if integer("num_steps", num_steps) < 1:
        raise ValueError(f"num_steps must be an integer of at least 1; got {num_steps!r}")
    if num_steps > MAX_NUM_STEPS:  # before so many are made
        raise ValueError(f"num_steps must be at most 2^24; got {num_steps}")
    return num_steps


def _as_float64(betas: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    if isinstance(betas, Tensor):
        return betas.detach().to("cpu", torch.float64, copy=True)
    try:
        return torch.from_numpy(np.array(betas, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"betas must be numbers; got {type(betas).__name__}: {error}") from None


def _iterable(name: str, values: Iterable[int]) -> Iterable[int]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of integers; got {type(values).__name__}")
    return values


def _shortened(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, …]"
