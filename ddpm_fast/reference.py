"""The method's formulas, each once, in plain PyTorch: what the kernels are tested against.

Every function computes in the dtype it is given (float64 in the tests) and takes timesteps as
int64 [N], one a sample, which index the schedule's tables. The noise is float32 by contract: the
functions that draw it, which stand in reference_noise.py, reproduce the kernels' arithmetic, fma
included, to the last bit.

Sources: [Ho] Ho, Jain & Abbeel 2020; [ND] Nichol & Dhariwal 2021; [Song] Song, Meng & Ermon 2021;
[SH] Salimans & Ho 2022; [Salmon] Salmon et al. 2011.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .reference_network import group_moments as group_moments
from .reference_network import group_norm_silu as group_norm_silu
from .reference_noise import TIMESTEP_STREAM as TIMESTEP_STREAM
from .reference_noise import antithetic_timesteps as antithetic_timesteps
from .reference_noise import box_muller as box_muller
from .reference_noise import f32
from .reference_noise import first_words as first_words
from .reference_noise import fma as fma
from .reference_noise import noise_words as noise_words
from .reference_noise import philox4x32_10 as philox4x32_10
from .reference_noise import randn as randn
from .reference_noise import random_timesteps as random_timesteps
from .schedule import ModelVariance, NoiseSchedule, Prediction, Variance

Cdf = Literal["exact", "tanh"]


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``table[t]`` in ``like``'s dtype, shaped [N, 1, …] to meet its dimensions."""
    values = table.to(like.device)[t].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


# Forward process ---------------------------------------------------------------------------


def q_step(x_prev: Tensor, t: Tensor, schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """q(x_t | x_{t-1}): √(1−β_t) x_{t-1} + √β_t ε [Ho, eq. 2]."""
    return at(schedule.alphas.sqrt(), t, x_prev) * x_prev + at(schedule.betas.sqrt(), t, eps) * eps


def q_mean_variance(
    x0: Tensor, t: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_t | x_0): √ᾱ_t x_0, 1 − ᾱ_t [Ho, eq. 4]."""
    variance = at(schedule.one_minus_alphas_cumprod, t, x0)
    return at(schedule.sqrt_alphas_cumprod, t, x0) * x0, variance, variance.log()


def q_sample(x0: Tensor, t: Tensor, schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """q(x_t | x_0): √ᾱ_t x_0 + √(1−ᾱ_t) ε [Ho, eq. 4]."""
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, eps)
    return fma(at(schedule.sqrt_alphas_cumprod, t, x0), x0, sigma * eps)


def q_posterior(
    x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean μ̃_t, variance β̃_t and clipped log-variance of q(x_{t-1} | x_t, x_0) [Ho, eqs. 6, 7]."""
    mean = (
        at(schedule.posterior_mean_coef1, t, x0) * x0
        + at(schedule.posterior_mean_coef2, t, x_t) * x_t
    )
    return (
        mean,
        at(schedule.posterior_variance, t, x_t),
        at(schedule.posterior_log_variance_clipped, t, x_t),
    )


def unit_from_pixel(pixel: Tensor) -> Tensor:
    """Pixels 0 … 255 in [-1, 1]: (p − 127.5)/127.5; of uint8 in float32."""
    p = (pixel if pixel.is_floating_point() else pixel.float()) - 127.5
    if p.dtype != torch.float32:
        return p / 127.5
    # 1/127.5 in two float32 parts, as in csrc/core/add_noise.h
    return fma(p, f32("0x1.010102p-7", p), p * f32("-0x1.fdfdfep-32", p))


# Conversions between ε, x̂₀ and v ------------------------------------------------------------


def x0_from_eps(x_t: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(x_t − √(1−ᾱ) ε)/√ᾱ [Ho, eq. 4 solved for x_0]. Infinite or NaN where ᾱ = 0."""
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * (x_t - sigma * eps)


def eps_from_x0(x_t: Tensor, x0: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(x_t − √ᾱ x_0)/√(1−ᾱ) [Ho, eq. 4 solved for ε]."""
    signal = at(schedule.sqrt_alphas_cumprod, t, x_t)
    return (x_t - signal * x0) / at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)


def v_from_x0_eps(x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """√ᾱ ε − √(1−ᾱ) x_0 [SH, appendix D]."""
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, x0)
    return at(schedule.sqrt_alphas_cumprod, t, eps) * eps - sigma * x0


def x0_from_v(x_t: Tensor, v: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """√ᾱ x_t − √(1−ᾱ) v [SH, appendix D]."""
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return at(schedule.sqrt_alphas_cumprod, t, x_t) * x_t - sigma * v


def eps_from_v(x_t: Tensor, v: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """√(1−ᾱ) x_t + √ᾱ v [SH, appendix D]."""
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return sigma * x_t + at(schedule.sqrt_alphas_cumprod, t, v) * v


def x0_from_output(
    x_t: Tensor, m: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor:
    """x̂₀ of what a model predicts: ε, x_0 or v."""
    if prediction == "sample":
        return m
    convert = x0_from_eps if prediction == "epsilon" else x0_from_v
    return convert(x_t, m, t, schedule)


# Reverse process ---------------------------------------------------------------------------


def guided(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """m_u + s (m_c − m_u): classifier-free guidance [Ho & Salimans 2022]; scale [N] or 0-d."""
    return fma(scale.reshape(-1, *[1] * (cond.ndim - 1)), cond - uncond, uncond)


def predict_x0(x: Tensor, m: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """r · (c_m m + c_x x), before the clip, of the model output's mean channels m."""
    r, c_x, c_m = (at(rows[:, i], step, x) for i in range(3))
    return r * fma(c_m, m, c_x * x)


def clip_x0(x0: Tensor, clip: tuple[float, float]) -> Tensor:
    """x̂₀ kept in [lo, hi]; NaN passes."""
    return x0.clamp(*clip)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: Tensor,
    z: Tensor,
    *,
    variance: ModelVariance = "none",
    clip: tuple[float, float] = (-math.inf, math.inf),
    model_output_uncond: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    x0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step p(x_{t-1} | x_t) of any sampler that a table describes.

    x̂₀ = clip(r · fma(c_m, m, c_x x)), x′ = fma(b_0, x̂₀, fma(b_x, x, fma(b_m, m, σ z)))
    [Ho, eqs. 7, 11, 15; Song, eq. 12]; learned variances [ND, eq. 15].

    Args:
        x: [N, C, …], in the dtype of the computation, as are the following.
        model_output: [N, C, …], or [N, 2C, …] with a variance that is not "none".
        rows: [S, 9] of a StepTable.
        step: int64 [N], which row each sample takes.
        z: standard normals like x.
        variance: what the second half of channels means, StepTable.model_variance.
        clip: bounds of x̂₀.
        model_output_uncond, guidance_scale: like model_output; [N] or 0-d.
        x0: takes the place of x̂₀ before the clip.

    Returns:
        x′ and the clipped x̂₀.
    """
    m, v = model_output, None
    uncond = model_output_uncond
    if variance != "none":
        m, v = model_output.chunk(2, 1)
        uncond = None if uncond is None else uncond.chunk(2, 1)[0]
    if uncond is not None:
        assert guidance_scale is not None
        m = guided(m, uncond, guidance_scale)
    x0_hat = clip_x0(predict_x0(x, m, rows, step) if x0 is None else x0, clip)

    b_0, b_x, b_m, sigma, log_min, log_max = (at(rows[:, i], step, x) for i in range(3, 9))
    noise_scale = sigma
    if v is not None and variance != "ignored":
        log_var = v
        if variance == "learned_range":
            log_var = fma(fma(v, _half(v), _half(v)), log_max - log_min, log_min)
        noise_scale = sigma * (0.5 * log_var).clamp(-87, 87).exp()
    noise_term = torch.where(sigma == 0, torch.zeros_like(z), noise_scale * z)
    return fma(b_0, x0_hat, fma(b_x, x, fma(b_m, m, noise_term))), x0_hat


def _half(like: Tensor) -> Tensor:
    return torch.full((), 0.5, dtype=like.dtype, device=like.device)


# The bound and the objective ----------------------------------------------------------------


def p_mean_log_variance(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of p_θ(x_{t-1} | x_t), and the clipped x̂₀ [Ho, eq. 11; ND, eq. 15].

    Args:
        x_t: [N, C, …].
        model_output: [N, C, …], or [N, 2C, …] with a variance that is learned.
        t: int64 [N].
        prediction: what the (first half of the) model's output is.
        variance: "fixed_small" β̃ or "fixed_large" β, at t = 0 both β̃ of t = 1; "learned" log σ²,
            "learned_range" a point in [-1, 1] between log β̃ and log β.
        clip: bounds of x̂₀.
    """
    m, log_variance = model_output, at(schedule.posterior_log_variance_clipped, t, x_t)
    if variance in ("learned", "learned_range"):
        m, v = model_output.chunk(2, 1)
        fraction = fma(v, _half(v), _half(v))
        log_beta = at(schedule.betas.log(), t, x_t)
        between = fma(fraction, log_beta - log_variance, log_variance)
        log_variance = v if variance == "learned" else between
    else:
        if variance == "fixed_large":
            log_beta = schedule.betas.log()
            log_beta[0] = schedule.posterior_log_variance_clipped[0]
            log_variance = at(log_beta, t, x_t)
        log_variance = log_variance.expand_as(m)
    x0 = x0_from_output(x_t, m, t, schedule, prediction)
    x0_hat = clip_x0(x0, clip)
    return q_posterior(x0_hat, x_t, t, schedule)[0], log_variance, x0_hat


def vlb_terms(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: tuple[float, float] = (-math.inf, math.inf),
    cdf: Cdf = "exact",
) -> Tensor:
    """Each sample's term of the bound in bits/dim, [N]: KL(q(x_{t-1} | x_t, x_0) ‖ p_θ), and at
    t = 0 the decoder's −log p_θ(x_0 | x_1) [Ho, eqs. 5 and 13].

    Args:
        x0: [N, C, …] pixels in [-1, 1].
        x_t: of the same shape, drawn from q(x_t | x_0).
        model_output, t, schedule, prediction, variance, clip: as for :func:`p_mean_log_variance`.
        cdf: as for :func:`decoder_nll`.
    """
    mean, log_variance, _ = p_mean_log_variance(
        x_t, model_output, t, schedule, prediction=prediction, variance=variance, clip=clip
    )
    true_mean, _, true_log_variance = q_posterior(x0, x_t, t, schedule)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = decoder_nll(x0, mean, 0.5 * log_variance, cdf)
    return _bits_per_dim(torch.where(t.reshape(-1, *[1] * (x0.ndim - 1)) == 0, nll, kl))


def prior_kl(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL(q(x_T | x_0) ‖ N(0, 1)) of each sample in bits/dim, [N] [Ho, eq. 5's first term]."""
    last = torch.full(x0.shape[:1], len(schedule) - 1, device=x0.device)
    mean, _, log_variance = q_mean_variance(x0, last, schedule)
    standard = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return _bits_per_dim(normal_kl(mean, log_variance, standard, standard))


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats[:, None].flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) in nats, elementwise [Ho, eq. 5's terms]."""
    ratio = logvar1 - logvar2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def decoder_nll(x0: Tensor, mean: Tensor, log_std: Tensor, cdf: Cdf = "exact") -> Tensor:
    """−log of the probability a Gaussian gives to a pixel's bin, in nats, elementwise [Ho, eq. 13].

    Args:
        x0: pixels in [-1, 1], 256 levels 2/255 apart; the outermost bins reach to infinity.
        mean, log_std: of the Gaussian.
        cdf: "exact" by erfc, each tail on its own side; "tanh" the approximation
            Φ(x) ≈ ½ (1 + tanh(√(2/π)(x + 0.044715 x³))) that improved-diffusion uses.

    Returns:
        Probabilities are clamped at 1e-12.
    """
    if cdf not in ("exact", "tanh"):
        raise ValueError(f"cdf must be 'exact' or 'tanh'; got {cdf!r}")
    centred, inverse_std = x0 - mean, torch.exp(-log_std)
    upper, lower = inverse_std * (centred + 1 / 255), inverse_std * (centred - 1 / 255)
    lowest, highest = x0 < -0.999, x0 > 0.999
    if cdf == "tanh":
        below_upper, below_lower = _tanh_cdf(upper), _tanh_cdf(lower)
        inside = below_upper - below_lower
        probability = torch.where(
            lowest, below_upper, torch.where(highest, 1 - below_lower, inside)
        )
    else:
        # Φ(b) − Φ(a) from the tail that both share, where neither is near 1.
        flip = lower > 0
        a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        inside = _normal_cdf(b) - _normal_cdf(a)
        probability = torch.where(
            lowest, _normal_cdf(upper), torch.where(highest, _normal_cdf(-lower), inside)
        )
    return -probability.clamp(min=1e-12).log()


def decoder_nll_gradient(
    x0: Tensor, mean: Tensor, log_std: Tensor, cdf: Cdf = "exact"
) -> tuple[Tensor, Tensor]:
    """:func:`decoder_nll` by the mean and by log_std; 0 where the probability is clamped.

    With z± = (x_0 − μ ± 1/255)/σ and a density f of the cdf: (f(z₊) − f(z₋)) / (σ p) and
    (z₊ f(z₊) − z₋ f(z₋)) / p; a bin that reaches to infinity lacks that end's term.
    """
    centred, inverse_std = x0 - mean, torch.exp(-log_std)
    upper, lower = inverse_std * (centred + 1 / 255), inverse_std * (centred - 1 / 255)
    density = _tanh_density if cdf == "tanh" else _normal_density
    zero = torch.zeros_like(upper)
    at_upper = torch.where(x0 > 0.999, zero, density(upper))
    at_lower = torch.where(x0 < -0.999, zero, density(lower))
    nll = decoder_nll(x0, mean, log_std, cdf)
    # 1 / p; where p is clamped the result does not move.
    inverse_p = torch.where(nll >= -math.log(1.0001e-12), zero, nll.exp())
    by_mean = inverse_std * (at_upper - at_lower) * inverse_p
    return by_mean, (upper * at_upper - lower * at_lower) * inverse_p


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _tanh_density(x: Tensor) -> Tensor:
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * slope * (1 - tanh**2)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def denoising_target(
    x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor:
    """What a model of x_t = √ᾱ x_0 + √(1−ᾱ) ε is trained to say: ε, x_0 or v [Ho, eq. 14; SH]."""
    if prediction == "sample":
        return x0
    return eps if prediction == "epsilon" else v_from_x0_eps(x0, eps, t, schedule)


def regression(target: Tensor, predicted: Tensor) -> Tensor:
    """The mean of (target − m)² over each sample's elements, [N]; of ε, L_simple [Ho, eq. 14]."""
    return ((target - predicted) ** 2)[:, None].flatten(1).mean(1)


def regression_gradient(target: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    """Of weights [N] times :func:`regression`, by the prediction."""
    scale = 2 / max(math.prod(target.shape[1:]), 1) * weights
    return scale.reshape(-1, *[1] * (target.ndim - 1)) * (predicted - target)


# What timesteps weigh in training -----------------------------------------------------------


def min_snr_weights(schedule: NoiseSchedule, prediction: Prediction, gamma: float) -> Tensor:
    """Each timestep's weight min(snr, γ) of the regression on x_0, as the regression on what the
    model predicts takes it [Hang et al. 2023, section 3.4]; float64 [T]."""
    snr = schedule.snr
    if prediction == "sample":
        return snr.clamp(max=gamma)
    return (
        (gamma / snr).clamp(max=1) if prediction == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
    )


def p2_weights(schedule: NoiseSchedule, prediction: Prediction, gamma: float, k: float) -> Tensor:
    """Each timestep's weight (k + snr)^−γ of the regression on ε, as the regression on what the
    model predicts takes it [Choi et al. 2022, eq. 8]; float64 [T]."""
    snr = schedule.snr
    of_eps = (k + snr) ** -gamma
    if prediction == "epsilon":
        return of_eps
    return of_eps * (snr if prediction == "sample" else snr / (snr + 1))
