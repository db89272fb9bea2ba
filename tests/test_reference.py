"""The reference formulas: known values, and the identities that tie them together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, randn, reference

SCHEDULE = NoiseSchedule.cosine()
T = torch.tensor([0, 1, 500, 998])


def doubles(seed, shape=(4, 3, 5)):
    return randn(shape, seed=seed).double()


def test_fma_rounds_once():
    """Against exact integer arithmetic, at random values and where float64 would round twice."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(20_000).astype(np.float32) for _ in range(3))
    c[:5000] *= np.float32(2.0**-20) * a[:5000]
    # Ties of the float32 sum, moved by a product far below float64's last place.
    a[-3000:], b[-3000:] = np.float32(2.0**-40) * a[-3000:], np.float32(2.0**-40) * b[-3000:]
    c[-3000:] = np.float32(1) + np.float32(2.0**-23) * rng.integers(0, 2**22, 3000)
    a[-6000:-3000] = 1 + np.float32(2.0**-12)
    b[-6000:-3000] = 1 + np.float32(2.0**-12) * rng.integers(1, 5, 3000)
    found = reference.fma(*(torch.from_numpy(x) for x in (a, b, c))).numpy()
    for x, y, z, result in zip(a, b, c, found, strict=True):
        numerator_x, denominator_x = float(x).as_integer_ratio()
        numerator_y, denominator_y = float(y).as_integer_ratio()
        numerator_z, denominator_z = float(z).as_integer_ratio()
        top = numerator_x * numerator_y * denominator_z
        top += numerator_z * denominator_x * denominator_y
        bottom = denominator_x * denominator_y * denominator_z
        assert result == rounded_ratio(top, bottom)


def rounded_ratio(top: int, bottom: int) -> np.float32:
    """top / bottom to the nearest float32, ties to even, by integers alone."""
    if top == 0:
        return np.float32(0)
    sign, top = (-1 if top < 0 else 1), abs(top)
    shift = 24 - (top.bit_length() - bottom.bit_length())
    for exponent in (shift, shift - 1):
        scaled = (top << exponent, bottom) if exponent >= 0 else (top, bottom << -exponent)
        quotient, rest = divmod(*scaled)
        if quotient.bit_length() <= 24:
            break
    twice = 2 * rest
    if twice > scaled[1] or (twice == scaled[1] and quotient & 1):
        quotient += 1
    return np.float32(sign * math.ldexp(quotient, -exponent))


def test_fma_passes_nan_and_infinity():
    nan, inf, one = (torch.tensor([v], dtype=torch.float32) for v in (math.nan, math.inf, 1.0))
    assert reference.fma(nan, one, one).isnan()
    assert reference.fma(inf, one, one) == math.inf
    assert reference.fma(one, one, -inf) == -math.inf
    assert reference.fma(inf, one, -inf).isnan()


def test_q_sample_is_t_steps_of_q_step():
    """Composing eq. 2 t times gives eq. 4's mean, and its variance by the same recursion."""
    schedule = NoiseSchedule.linear(20)
    x0 = doubles(1, (1, 7))
    mean, variance = x0, torch.zeros(1, 1).double()
    for t in range(20):
        step = torch.tensor([t])
        signal = reference.q_step(
            torch.ones(1, 1).double(), step, schedule, torch.zeros(1, 1).double()
        )
        noise = reference.q_step(
            torch.zeros(1, 1).double(), step, schedule, torch.ones(1, 1).double()
        )
        mean, variance = (
            reference.q_step(mean, step, schedule, 0 * mean),
            signal**2 * variance + noise**2,
        )
        found = reference.q_mean_variance(x0, step, schedule)
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1], variance)
        torch.testing.assert_close(found[2], variance.log())


def test_conversions_invert_each_other():
    x0, eps = doubles(1), doubles(2)
    x_t = reference.q_sample(x0, T, SCHEDULE, eps)
    v = reference.v_from_x0_eps(x0, eps, T, SCHEDULE)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(reference.x0_from_eps(x_t, eps, T, SCHEDULE), x0, **close)
    torch.testing.assert_close(reference.eps_from_x0(x_t, x0, T, SCHEDULE), eps, **close)
    torch.testing.assert_close(reference.x0_from_v(x_t, v, T, SCHEDULE), x0, **close)
    torch.testing.assert_close(reference.eps_from_v(x_t, v, T, SCHEDULE), eps, **close)


def test_q_posterior_is_bayes_rule():
    """Up to a constant, q(x_{t-1}|x_t, x_0) ∝ q(x_t|x_{t-1}) q(x_{t-1}|x_0)."""
    schedule, t = NoiseSchedule.linear(10), torch.tensor([4])
    x0, x_t = torch.tensor([[0.3]]).double(), torch.tensor([[-0.8]]).double()
    mean, variance, log_variance = reference.q_posterior(x0, x_t, t, schedule)
    grid = torch.linspace(-3, 3, 61).double()[:, None]
    before_mean, before_variance, _ = reference.q_mean_variance(x0, t - 1, schedule)
    alpha, beta = schedule.alphas[4], schedule.betas[4]
    log_joint = -((x_t - alpha.sqrt() * grid) ** 2) / (2 * beta)
    log_joint = log_joint - (grid - before_mean) ** 2 / (2 * before_variance)
    log_posterior = -((grid - mean) ** 2) / (2 * variance)
    difference = log_joint - log_posterior
    torch.testing.assert_close(
        difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(log_variance, variance.log())


def test_ddpm_step_is_the_posterior_at_x0_hat():
    table = SCHEDULE.step_table(prediction="epsilon", variance="fixed_small")
    x_t, eps, z = doubles(3), doubles(4), doubles(5)
    steps = 999 - T
    out, x0_hat = reference.reverse_step(x_t, eps, table.rows.double(), steps, z, clip=(-1.0, 1.0))
    expected = reference.x0_from_eps(x_t, eps, T, SCHEDULE).clamp(-1, 1)
    torch.testing.assert_close(x0_hat, expected, rtol=1e-4, atol=1e-4)
    mean, variance, _ = reference.q_posterior(x0_hat, x_t, T, SCHEDULE)
    noise = torch.where(T.reshape(-1, 1, 1) > 0, variance.sqrt() * z, 0.0)
    torch.testing.assert_close(out, mean + noise, rtol=1e-6, atol=1e-6)


def test_guidance():
    cond, uncond = doubles(1), doubles(2)
    for scale in (0.0, 1.0, 3.0):
        found = reference.guided(cond, uncond, torch.tensor(scale).double())
        torch.testing.assert_close(found, (1 - scale) * uncond + scale * cond)


def test_normal_kl_matches_golden(golden):
    for known in golden["normal_kl"]:
        arguments = [
            torch.tensor(float(known[k]), dtype=torch.float64)
            for k in ("mean1", "logvar1", "mean2", "logvar2")
        ]
        nats = reference.normal_kl(*arguments).item()
        assert nats == pytest.approx(float(known["nats"]), rel=1e-12, abs=1e-15)


def test_decoder_nll_matches_golden(golden):
    for known in golden["decoder_nll"]:
        x0, mean, log_std = (
            torch.tensor(v, dtype=torch.float64)
            for v in (known["pixel"] / 127.5 - 1, float(known["mean"]), float(known["log_std"]))
        )
        nats = reference.decoder_nll(x0, mean, log_std).item()
        assert nats == pytest.approx(float(known["nats"]), rel=1e-10)
        approximate = reference.decoder_nll(x0, mean, log_std, cdf="tanh").item()
        assert approximate == pytest.approx(nats, rel=0.02)
        assert approximate != nats


def test_decoder_probabilities_sum_to_one():
    """Over the 256 levels, far in the tails too; beyond the clamp nothing is added."""
    levels = torch.arange(256).double() / 127.5 - 1
    for mean, log_std in ((0.0, -2.0), (0.93, -4.0), (-3.0, -0.5)):
        for cdf in ("exact", "tanh"):
            nats = reference.decoder_nll(
                levels, torch.tensor(mean).double(), torch.tensor(log_std).double(), cdf
            )
            assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="cdf must be 'exact' or 'tanh'"):
        reference.decoder_nll(levels, levels, levels, cdf="erf")


def test_decoder_keeps_the_upper_tail():
    """Ten standard deviations above the mean: 1 − Φ by erfc, where Φ(b) − Φ(a) would be 0."""
    x0, mean, log_std = (torch.tensor(v).double() for v in (0.5, 0.4, -4.9))
    mirrored = reference.decoder_nll(-x0, -mean, log_std)
    assert reference.decoder_nll(x0, mean, log_std).item() == pytest.approx(mirrored.item())


def test_regression():
    eps, predicted = doubles(1), doubles(2)
    expected = [((a - b) ** 2).mean() for a, b in zip(eps, predicted, strict=True)]
    torch.testing.assert_close(reference.regression(eps, predicted), torch.stack(expected))
