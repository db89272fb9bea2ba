"""The bound's terms as the kernels take them: one row of nine float32 numbers a timestep.

With ratio = log β̃ − log σ², the log of q's variance over p_θ's, and q and p_θ sharing the share of
x_t in their means, a term of the bound (Ho et al. 2020, eq. 5) is

    KL = ½ (e^ratio − 1 − ratio + (coef1² / β̃) e^ratio (x_0 − x̂₀)²),

whose factors are computed in float64 and rounded once, so that nothing cancels in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import Cdf
from .schedule import NoiseSchedule, Prediction, Variance

# signal, sigma: x_t = signal x_0 + sigma ε. r, c_x, c_m: x̂₀ = clip(r (c_m m + c_x x_t)).
# precision: coef1² / β̃. ratio_min, ratio_max: the ratio where the model's v is −1 and 1, both the
# same for fixed variances. log_variance: log β̃, t = 0 taking t = 1's value.
COLUMNS = (
    "signal",
    "sigma",
    "r",
    "c_x",
    "c_m",
    "precision",
    "ratio_min",
    "ratio_max",
    "log_variance",
)


def vlb_rows(
    schedule: NoiseSchedule, prediction: Prediction, variance: Variance, device: torch.device
) -> Tensor:
    """float32 [T, 9] on ``device``, made once.

    Raises:
        ValueError: a step that has no float32 form, such as epsilon prediction where ᾱ is 0.
    """
    return schedule.table_on(
        device, f"vlb {prediction} {variance}", lambda: _rows(schedule, prediction, variance)
    )


def _rows(schedule: NoiseSchedule, prediction: Prediction, variance: Variance) -> Tensor:
    signal, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    r, c_x, c_m = {
        "epsilon": (schedule.sqrt_recip_alphas_cumprod, one, -sigma),
        "sample": (one, zero, one),
        "v_prediction": (one, signal, -sigma),
    }[prediction]
    log_variance, log_beta = schedule.posterior_log_variance_clipped, schedule.betas.log()
    precision = schedule.posterior_mean_coef1**2 * torch.exp(-log_variance)
    to_beta = log_variance - log_beta
    if variance == "fixed_large":
        to_beta[0] = 0.0  # there, the variance is β̃ of t = 1, too
    ratio_min = to_beta if variance == "fixed_large" else zero
    ratio_max = zero if variance == "fixed_small" else to_beta
    rows = torch.stack(
        [signal, sigma, r, c_x, c_m, precision, ratio_min, ratio_max, log_variance], 1
    )
    held = rows.float().isfinite().all(1)
    # What is traced has no values to look at.
    if not torch.compiler.is_compiling() and not bool(held.all()):
        t = int((~held).nonzero()[0])
        raise ValueError(
            f"the bound's term at timestep {t} has no float32 form: alphas_cumprod is "
            f"{schedule.alphas_cumprod[t].item():.3g} there; take another prediction than "
            f"{prediction!r}, or smaller betas"
        )
    return rows


class Terms(NamedTuple):
    """Of each element, [N, C, …]: in nats, and by the model's output."""

    nats: Tensor
    squared_error: Tensor  # (x_0 − x̂₀)², x̂₀ clipped
    by_m: Tensor
    by_v: Tensor  # zeros where the variance is fixed


def terms(
    x0: Tensor,
    eps: Tensor,
    m: Tensor,
    v: Tensor | None,
    rows: Tensor,
    t: Tensor,
    *,
    variance: Variance,
    clip: tuple[float, float],
    cdf: Cdf,
) -> Terms:
    """What the kernels compute, in the dtype given; :func:`reference.vlb_terms` is what it equals.

    Args:
        x0, eps, m: [N, C, …]. x_t is made of the first two.
        v: the model's second half of channels, where the variance is learned.
        rows: [T, 9] of :func:`vlb_rows`.
        t: int64 [N]. At 0 the term is the decoder's.
        variance, clip, cdf: as for :func:`reference.vlb_terms`.
    """
    row = {name: reference.at(rows[:, i], t, x0) for i, name in enumerate(COLUMNS)}
    x_t = reference.fma(row["signal"], x0, row["sigma"] * eps)
    unclipped = row["r"] * reference.fma(row["c_m"], m, row["c_x"] * x_t)
    x0_hat = reference.clip_x0(unclipped, clip)
    error = x0 - x0_hat
    ratio, ratio_by_v = row["ratio_min"].expand_as(m), torch.zeros_like(m)
    if variance == "learned":
        assert v is not None
        ratio, ratio_by_v = row["log_variance"] - v, torch.full_like(m, -1.0)
    elif variance == "learned_range":
        assert v is not None
        ratio_by_v = (0.5 * (row["ratio_max"] - row["ratio_min"])).expand_as(m)
        ratio = reference.fma(v + 1, ratio_by_v, row["ratio_min"])
    ratio = ratio.clamp(-87, 87)  # float32's range of exp

    scaled = row["precision"] * ratio.exp() * error
    kl = 0.5 * (torch.expm1(ratio) - ratio + scaled * error)
    kl_by_ratio = 0.5 * (torch.expm1(ratio) + scaled * error)

    log_std = 0.5 * (row["log_variance"] - ratio)
    nll = reference.decoder_nll(x0, x0_hat, log_std, cdf)  # at t = 0 the mean is x̂₀
    nll_by_mean, nll_by_log_std = reference.decoder_nll_gradient(x0, x0_hat, log_std, cdf)

    first = (t == 0).reshape(-1, *[1] * (m.ndim - 1))
    by_x0_hat = torch.where(first, nll_by_mean, -scaled)
    by_ratio = torch.where(first, -0.5 * nll_by_log_std, kl_by_ratio)
    held = (unclipped < clip[0]) | (unclipped > clip[1])  # a NaN is not: it reaches the gradient
    by_m = torch.where(held, torch.zeros_like(m), by_x0_hat * row["r"] * row["c_m"])
    return Terms(torch.where(first, nll, kl), error**2, by_m, by_ratio * ratio_by_v)


def bits_per_nat(shape: torch.Size) -> float:
    """What nats summed over a sample of a batch are times in bits/dim."""
    return 1 / (math.log(2) * max(math.prod(shape[1:]), 1))
