"""The method's formulas, each once, in plain PyTorch: what the kernels are tested against.

Every function computes in the dtype it is given (float64 in the tests) and takes timesteps as
int64 [N], one a sample, which index the schedule's tables. The noise is float32 by contract: the
functions that draw it reproduce the kernels' arithmetic, fma included, to the last bit.

Sources: [Ho] Ho, Jain & Abbeel 2020; [ND] Nichol & Dhariwal 2021; [Song] Song, Meng & Ermon 2021;
[SH] Salimans & Ho 2022; [Salmon] Salmon et al. 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .schedule import ModelVariance, NoiseSchedule, Prediction, Variance

Cdf = Literal["exact", "tanh"]


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``table[t]`` in ``like``'s dtype, shaped [N, 1, …] to meet its dimensions."""
    values = table.to(like.device)[t].to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c. In float32 rounded once, as a fused multiply-add; in float64 as written."""
    if a.dtype != torch.float32:
        return a * b + c
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())  # exact
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # TwoSum (Knuth)
    # Round to odd: where float64 had to round, its last bit becomes 1, so that the rounding to
    # float32 that follows sees on which side of a tie the exact sum lies (Boldo & Melquiond 2008).
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & ((bits & 1) == 0)
    return torch.where(inexact, bits + towards, bits).view(torch.float64).float()


# Noise (docs/noise.md) ---------------------------------------------------------------------

_WORD = 0xFFFFFFFF
TIMESTEP_STREAM = 3


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four random words of a 128-bit counter under a 64-bit key [Salmon, section 3.3].

    Args:
        counter: four int64 tensors of values below 2^32, broadcastable.
        key: two of the same.

    Returns:
        Four int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64: the masks below bring out the right 32 bits.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product1 >> 32 & _WORD) ^ c1 ^ k0
        c1 = product1 & _WORD
        c2 = (product0 >> 32 & _WORD) ^ c3 ^ k1
        c3 = product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def noise_words(
    blocks: Tensor, draw: Tensor, seeds: Tensor, sample_ids: Tensor
) -> tuple[Tensor, ...]:
    """The words at an address: key = seed, counter = (block, draw, sample low, sample high).

    Args:
        blocks: int64, element index >> 2.
        draw: int64, stream << 24 | index.
        seeds: int64, 64-bit patterns (two's complement).
        sample_ids: int64.
    """
    counter = (blocks, draw, sample_ids & _WORD, sample_ids >> 32 & _WORD)
    return philox4x32_10(counter, (seeds & _WORD, seeds >> 32 & _WORD))


def _horner(x: Tensor, *coefficients: str) -> Tensor:
    total = _f32(coefficients[0], x).expand_as(x)
    for c in coefficients[1:]:
        total = fma(total, x, _f32(c, x))
    return total


def _f32(literal: str, like: Tensor) -> Tensor:
    return torch.tensor(float.fromhex(literal), dtype=torch.float32, device=like.device)


def _minus_two_log_uniform(w: Tensor) -> Tensor:
    """-2 ln((w + ½) 2^-32) in float32: csrc/core/normal.h, line by line."""
    flipped = w ^ _WORD
    u = fma(torch.minimum(w, flipped).float(), _f32("0x1p-32", w), _f32("0x1p-33", w))
    t = torch.where(w < flipped, u, 1 - u)
    bits = t.view(torch.int32)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).view(torch.float32)
    s = torch.where(k == 0, -u, f - 1)
    q = _horner(
        s,
        "0x1.a359bcp-3",
        "-0x1.4ec5b2p-2",
        "0x1.615c82p-2",
        "-0x1.9737dcp-2",
        "0x1.ff5b64p-2",
        "-0x1.555b1cp-1",
        "0x1.00007ep+0",
    )
    return fma(k.float(), _f32("-0x1.62e430p+0", w), fma(q, s * s, -2 * s))


def box_muller(w_even: Tensor, w_odd: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals of two words (int64, below 2^32), float32: csrc/core/normal.h.

    U = (w_even + ½) 2^-32, r = √(−2 ln U), θ = 2π w_odd 2^-32: (r cos θ, r sin θ).
    """
    # By float64: torch's float32 sqrt is not correctly rounded on every processor.
    r = _minus_two_log_uniform(w_even).double().sqrt().float()
    quarter = ((w_odd << 2 & _WORD) ^ 0x80000000) - 0x80000000  # as a signed 32-bit integer
    y = quarter.float() * _f32("0x1p-32", r)
    y2 = y * y
    sin_low = _horner(y2, "-0x1.2cf5d4p-8", "0x1.465a3ep-4", "-0x1.4abba8p-1", "-0x1.18faf8p-24")
    sin_y = fma(y, _f32("0x1.921fb6p+0", r), y * sin_low)
    cos_y = _horner(
        y2, "0x1.d9f7bcp-11", "-0x1.55c664p-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0", "0x1p+0"
    )
    turn = w_odd + 0x20000000
    swap = turn & 0x40000000 != 0
    z_even = r * torch.where(swap, sin_y, cos_y)
    z_odd = r * torch.where(swap, cos_y, sin_y)
    return (
        torch.where(turn + 0x40000000 & 0x80000000 != 0, -z_even, z_even),
        torch.where(turn & 0x80000000 != 0, -z_odd, z_odd),
    )


def randn(shape: Sequence[int], seeds: Tensor, sample_ids: Tensor, draws: Tensor) -> Tensor:
    """Addressable standard normals.

    Args:
        shape: [N, …].
        seeds, sample_ids, draws: int64 [N]; a draw is stream << 24 | index.

    Returns:
        float32, contiguous, on ``sample_ids``' device.
    """
    elements = math.prod(shape[1:])
    blocks = torch.arange((elements + 3) // 4, device=sample_ids.device)
    w = noise_words(blocks, draws[:, None], seeds[:, None], sample_ids[:, None])
    z = torch.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], -1)
    return z.reshape(shape[0], 4 * len(blocks))[:, :elements].reshape(list(shape)).contiguous()


def random_timesteps(num_steps: int, seeds: Tensor, sample_ids: Tensor) -> Tensor:
    """Training timesteps, uniform on 0 … T−1: (w₀ · T) >> 32 of stream 3; int64 [N].

    Args:
        num_steps: T.
        seeds, sample_ids: int64 [N].
    """
    first = torch.zeros_like(sample_ids)
    words = noise_words(first, first + (TIMESTEP_STREAM << 24), seeds, sample_ids)
    return words[0] * num_steps >> 32


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
    return fma(p, _f32("0x1.010102p-7", p), p * _f32("-0x1.fdfdfep-32", p))


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
    return nats.flatten(1).mean(1) / math.log(2)


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
    return ((target - predicted) ** 2).flatten(1).mean(1)


def regression_gradient(target: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    """Of weights [N] times :func:`regression`, by the prediction."""
    scale = 2 / max(math.prod(target.shape[1:]), 1) * weights
    return scale.reshape(-1, *[1] * (target.ndim - 1)) * (predicted - target)


# Training: which timesteps, and what they weigh ----------------------------------------------


def first_words(stream: int, seeds: Tensor, sample_ids: Tensor) -> Tensor:
    """Word 0 of each sample's draw (stream, index 0): int64 [N], below 2^32."""
    first = torch.zeros_like(sample_ids)
    return noise_words(first, first + (stream << 24), seeds, sample_ids)[0]


def antithetic_timesteps(
    num_steps: int, group_size: int, seeds: Tensor, sample_ids: Tensor
) -> Tensor:
    """Training timesteps that each group of consecutive ids spreads evenly over 0 … T−1, from one
    random start [Kingma et al. 2021, appendix I.1]; int64 [N].

    Args:
        num_steps: T.
        group_size: G, below 2^31; ids g·G … g·G + G − 1 share word 0 of stream 3 of id g·G.
        seeds, sample_ids: int64 [N].
    """
    place = sample_ids % group_size
    start = first_words(TIMESTEP_STREAM, seeds, sample_ids - place)
    return (start + (place << 32) // group_size & _WORD) * num_steps >> 32


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
