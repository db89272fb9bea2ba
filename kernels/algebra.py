"""The formulas of csrc/core/{add_noise,reverse_step,exp,denoising_loss,vlb_terms,group_norm_silu}.h
on vectors, operation by operation."""

import triton
import triton.language as tl


@triton.jit
def unit_from_pixel(pixel):
    """A pixel 0 … 255 in [-1, 1]: (p - 127.5)/127.5, the reciprocal in two parts."""
    centred = pixel - 127.5
    return tl.fma(centred, 0.007843137718737125, centred * -4.638351647212602e-10)


@triton.jit
def q_sample(signal, sigma, x0, z):
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) z (Ho et al. 2020, eq. 4)."""
    return tl.fma(signal, x0, sigma * z)


@triton.jit
def guided(cond, uncond, scale):
    """m_u + s (m_c - m_u): classifier-free guidance (Ho & Salimans 2022)."""
    return tl.fma(scale, cond - uncond, uncond)


@triton.jit
def predict_x0(r, c_x, c_m, x, m):
    """x0_hat before the clip: r (c_m m + c_x x), r not multiplied out."""
    return r * tl.fma(c_m, m, c_x * x)


@triton.jit
def clip(x, lo, hi):
    """NaN passes. No bound is -0."""
    return tl.minimum(
        tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL),
        hi,
        propagate_nan=tl.PropagateNan.ALL,
    )


@triton.jit
def exp_with_excess(x):
    """exp(x) and exp(x) - 1 - x for x in [-87, 87], the second to full precision near 0 as well.
    NaN passes."""
    # Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    shifted = tl.fma(x, 1.4426950216293335, 12582912.0)
    k = shifted - 12582912.0
    f = tl.fma(k, -0.693145751953125, x)  # ln 2 in two parts: the first product is exact
    f = tl.fma(k, -1.428606765330187e-06, f)
    e = tl.fma(0.0013950478751212358, f, 0.008368882350623608)
    e = tl.fma(e, f, 0.04166620597243309)
    e = tl.fma(e, f, 0.1666651964187622)
    e = tl.fma(e, f, 0.5)  # (exp(f) - 1 - f) / f^2
    minus_one = tl.fma(e * f, f, f)
    exponent = shifted.to(tl.uint32, bitcast=True) << 23
    exp = (exponent + 0x3F800000).to(tl.float32, bitcast=True) * (minus_one + 1.0)
    return exp, tl.where(k == 0.0, e * f * f, exp - 1.0 - x)


@triton.jit
def exp_clamped(x):
    """exp(x) for x kept in [-87, 87]; NaN passes."""
    exp, _ = exp_with_excess(clip(x, -87.0, 87.0))
    return exp


@triton.jit
def sigma_of(sigma, log_var):
    """The model's own standard deviation, times the row's sigma (0 or 1)."""
    return sigma * exp_clamped(0.5 * log_var)


@triton.jit
def log_var_between(v, log_var_min, log_var_max):
    """Of v in [-1, 1] (Nichol & Dhariwal 2021, eq. 15)."""
    return tl.fma(tl.fma(v, 0.5, 0.5), log_var_max - log_var_min, log_var_min)


@triton.jit
def step_to(b_0, b_x, b_m, x0_hat, x, m, noise):
    """x' = fma(b_0, x0_hat, fma(b_x, x, fma(b_m, m, noise)))
    (Ho et al. 2020, eqs. 7, 11 and 15; Song et al. 2021, eq. 12)."""
    return tl.fma(b_0, x0_hat, tl.fma(b_x, x, tl.fma(b_m, m, noise)))


@triton.jit
def residual(PREDICTION: tl.constexpr, signal, sigma, m, x0, z):
    """m - target, which is z, x_0 or v (Salimans & Ho 2022)."""
    if PREDICTION == "epsilon":
        return m - z
    elif PREDICTION == "sample":
        return m - x0
    else:
        return m - tl.fma(signal, z, -(sigma * x0))


@triton.jit
def log_ratio(VARIANCE: tl.constexpr, v, ratio_min, ratio_max, log_variance):
    """The log of q's variance over p's, of the model's v, kept in the range of exp."""
    if VARIANCE == "learned":
        return clip(log_variance - v, -87.0, 87.0)
    elif VARIANCE == "learned_range":
        return clip(tl.fma(v + 1.0, 0.5 * (ratio_max - ratio_min), ratio_min), -87.0, 87.0)
    else:
        return ratio_min


@triton.jit
def kl_term(precision, ratio, error):
    """A KL in nats, and what it changes by with x0_hat and with the ratio; error = x_0 - x0_hat
    (Ho et al. 2020, eq. 5)."""
    exp, excess = exp_with_excess(ratio)
    scaled = precision * exp * error
    by_ratio = 0.5 * tl.fma(scaled, error, excess + ratio)
    return 0.5 * tl.fma(scaled, error, excess), -scaled, by_ratio


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) for z of at least -87, to 2 units in the last place; NaN passes."""
    z = tl.minimum(z, 87.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = tl.fma(z, -1.4426950216293335, 12582912.0)
    k = shifted - 12582912.0
    g = tl.fma(k, 0.693145751953125, z)
    g = tl.fma(k, 1.428606765330187e-06, g)
    e = tl.fma(0.008290272206068039, g, -0.04189816117286682)  # -exp(-g)
    e = tl.fma(e, g, 0.1666763871908188)
    e = tl.fma(e, g, -0.4999914765357971)
    e = tl.fma(e, g, 0.9999997019767761)
    e = tl.fma(e, g, -1.0)
    exponent = shifted.to(tl.uint32, bitcast=True) << 23
    minus_d = (e.to(tl.uint32, bitcast=True) + exponent).to(tl.float32, bitcast=True) - 1.0
    # From a guess of the exponent's bits, 5 % off, by a cubic and a quadratic step.
    r = (0xFEF311C7 - minus_d.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    error = tl.fma(minus_d, r, 1.0)
    r = tl.fma(r, tl.fma(error, error, error), r)
    error = tl.fma(minus_d, r, 1.0)
    return tl.fma(r, error, r)


@triton.jit
def silu(z):
    """z sigmoid(z); below -87, where it is -1e-36, what it is there."""
    z = tl.maximum(z, -87.0, propagate_nan=tl.PropagateNan.ALL)
    return z * sigmoid(z)


@triton.jit
def silu_derivative(z):
    """sigmoid(z) (1 + z (1 - sigmoid(z)))."""
    z = clip(z, -87.0, 87.0)  # past which 1 - sigmoid is 0, and inf times it NaN
    s = sigmoid(z)
    return s * tl.fma(z, 1.0 - s, 1.0)
