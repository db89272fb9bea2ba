"""Schedules and step tables against 50-digit values and against the papers' formulas."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import NoiseSchedule, StepTable, add_noise, randn

COLUMNS = ["r", "c_x", "c_m", "b_0", "b_x", "b_m", "sigma", "log_var_min", "log_var_max"]
NAMED = {
    "linear": NoiseSchedule.linear,
    "cosine": NoiseSchedule.cosine,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "quadratic": NoiseSchedule.quadratic,
    "sigmoid": NoiseSchedule.sigmoid,
    "constant": NoiseSchedule.constant,
    "jsd": NoiseSchedule.jsd,
}


def columns(table) -> dict[str, np.ndarray]:
    return dict(zip(COLUMNS, table.rows.double().numpy().T, strict=True))


def test_tables_match_golden(golden):
    names = {"beta": "betas", "alpha": "alphas"}
    for known in golden["schedules"]:
        arguments = {
            key: int(value) if key == "num_steps" else float(value)
            for key, value in known.items()
            if key not in ("schedule", "rows")
        }
        schedule = NAMED[known["schedule"]](**arguments)
        for row in known["rows"]:
            for key, value in row.items():
                if key == "t":
                    continue
                if key == "posterior_log_variance":
                    found = schedule.posterior_variance[row["t"]].log().item()
                else:
                    found = getattr(schedule, names.get(key, key))[row["t"]].item()
                assert found == pytest.approx(float(value), rel=1e-10, abs=0), (known, key, row)


def test_ddim_weights_match_golden(golden):
    for known in golden["ddim"]:
        schedule = NoiseSchedule.linear()
        table = schedule.step_table(
            prediction="epsilon",
            variance="fixed_small",
            method="ddim",
            eta=float(known["eta"]),
            timesteps=range(999, -1, -20),
            eps_source="model",
        )
        steps = table.timesteps.tolist()
        for row in known["rows"]:
            i = steps.index(row["t"])
            assert (steps[i + 1] if i + 1 < len(steps) else -1) == row["t_prev"]
            found = columns(table)
            for key, value in (("b_0", "weight_x0"), ("b_m", "weight_eps"), ("sigma", "sigma")):
                assert found[key][i] == pytest.approx(float(row[value]), rel=1e-7, abs=0)
            assert found["b_x"][i] == 0


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_identities(name, num_steps):
    """What must hold of any schedule: eq. 7 composes with eq. 4, and log tables are finite."""
    schedule = NAMED[name](num_steps=num_steps)
    s = schedule
    assert len(schedule) == num_steps
    assert torch.all(s.betas > 0)
    assert torch.all(s.alphas_cumprod.diff() < 0)
    torch.testing.assert_close(
        s.alphas_cumprod + s.one_minus_alphas_cumprod, torch.ones(num_steps).double()
    )
    # E[x_{t-1}] by the posterior of x_t = √ᾱ x_0 + …: coef1 + coef2 √ᾱ_t = √ᾱ_{t-1}
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * s.sqrt_alphas_cumprod
    torch.testing.assert_close(mean, s.alphas_cumprod_prev.sqrt())
    # and its variance: coef2² (1−ᾱ_t) + β̃ = 1 − ᾱ_{t-1}
    variance = s.posterior_mean_coef2**2 * s.one_minus_alphas_cumprod + s.posterior_variance
    torch.testing.assert_close(variance[1:], s.one_minus_alphas_cumprod[:-1])
    assert s.posterior_log_variance_clipped.isfinite().all()
    if num_steps > 1:
        assert s.posterior_log_variance_clipped[0] == s.posterior_log_variance_clipped[1]
    else:
        assert s.posterior_log_variance_clipped[0] == s.betas[0].log()


def test_named_schedules_have_their_formulas():
    t = 1000
    grid = np.linspace(0, 1, t)
    expected = {
        "linear": 1e-4 + grid * (0.02 - 1e-4),
        "quadratic": (0.01 + grid * (math.sqrt(0.02) - 0.01)) ** 2,
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-(12 * grid - 6))),
        "constant": np.full(t, 0.02),
        "jsd": 1 / (t - np.arange(t)),
    }
    for name, betas in expected.items():
        np.testing.assert_allclose(NAMED[name]().betas.numpy(), betas, rtol=1e-12)

    def bar(i):
        return np.cos((i / t + 0.008) / 1.008 * np.pi / 2) ** 2

    cosine = np.minimum(1 - bar(np.arange(1, t + 1)) / bar(np.arange(t)), 0.999)
    np.testing.assert_allclose(NAMED["cosine"]().betas.numpy(), cosine, rtol=1e-9)
    assert NAMED["jsd"]().alphas_cumprod[-1] == 0


def test_rescale_zero_terminal_snr():
    schedule = NoiseSchedule.scaled_linear()
    rescaled = schedule.rescale_zero_terminal_snr()
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.betas[-1] == 1
    torch.testing.assert_close(rescaled.alphas_cumprod[0], schedule.alphas_cumprod[0])
    root, old = rescaled.sqrt_alphas_cumprod, schedule.sqrt_alphas_cumprod
    shifted = (old - old[-1]) * old[0] / (old[0] - old[-1])
    torch.testing.assert_close(root, shifted, rtol=1e-9, atol=1e-12)
    table = rescaled.step_table(prediction="v_prediction", variance="fixed_small")
    assert table.rows.isfinite().all()
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        rescaled.step_table(prediction="epsilon", variance="fixed_small")
    rescaled.step_table(prediction="epsilon", variance="fixed_small", timesteps=[998, 500, 0])
    assert NoiseSchedule([0.5]).rescale_zero_terminal_snr().betas.tolist() == [1.0]


def test_spacings():
    schedule = NoiseSchedule.linear(1000)
    assert schedule.spaced_timesteps(4) == [750, 500, 250, 0]
    assert schedule.spaced_timesteps(4, spacing="trailing") == [999, 749, 499, 249]
    assert schedule.spaced_timesteps(4, spacing="linspace") == [999, 666, 333, 0]
    assert schedule.spaced_timesteps(1) == [0]
    assert schedule.spaced_timesteps(1, spacing="trailing") == [999]
    assert schedule.spaced_timesteps() == list(range(999, -1, -1))
    assert schedule.spaced_timesteps(timesteps=iter([7, 3])) == [7, 3]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_spacing_strictly_decreases(data):
    total = data.draw(st.integers(1, 2000))
    n = data.draw(st.integers(1, total))
    schedule = NoiseSchedule.constant(total, 1e-3)
    for spacing in ("leading", "trailing", "linspace"):
        steps = schedule.spaced_timesteps(n, spacing=spacing)
        assert len(steps) == n
        assert steps[-1] >= 0
        assert steps[0] < total
        assert all(a > b for a, b in itertools.pairwise(steps))
        if spacing == "trailing":
            assert steps[0] == total - 1


@pytest.mark.parametrize("timesteps", [None, [999, 800, 401, 400, 3], [500], [0]])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_table_inverts_the_forward_process(method, prediction, timesteps):
    """With the exact model output x̂₀ is x_0, and x′ has the signal and noise of the next level."""
    schedule = NoiseSchedule.cosine()
    for eta, source in (
        ((0.0, "x0"), (0.3, "x0"), (1.0, "model")) if method == "ddim" else ((0.0, "x0"),)
    ):
        table = schedule.step_table(
            prediction=prediction,
            variance="fixed_small",
            method=method,
            eta=eta,
            eps_source=source,
            timesteps=timesteps,
        )
        c = columns(table)
        t = table.timesteps
        ac = schedule.alphas_cumprod[t].numpy()
        prev = np.append(ac[1:], 1.0)
        # The coefficients of x_0 and ε in x_t and in the model's output.
        x = np.stack([np.sqrt(ac), np.sqrt(schedule.one_minus_alphas_cumprod[t].numpy())])
        m = {
            "epsilon": np.stack([np.zeros_like(ac), np.ones_like(ac)]),
            "sample": np.stack([np.ones_like(ac), np.zeros_like(ac)]),
            "v_prediction": np.stack([-x[1], x[0]]),
        }[prediction]
        x0_hat = c["r"] * (c["c_m"] * m + c["c_x"] * x)
        scale = 3e-7 * (1 + np.abs(c["r"]))
        assert np.all(np.abs(x0_hat[0] - 1) < scale)
        assert np.all(np.abs(x0_hat[1]) < scale)
        exact = np.array([[1.0], [0.0]])
        following = c["b_0"] * exact + c["b_x"] * x + c["b_m"] * m
        np.testing.assert_allclose(following[0], np.sqrt(prev), atol=1e-6)
        np.testing.assert_allclose(following[1] ** 2 + c["sigma"] ** 2, 1 - prev, atol=2e-6)
        assert c["sigma"][-1] == 0


def test_variances():
    schedule = NoiseSchedule.linear()

    def sigma(variance, timesteps=None):
        table = schedule.step_table(prediction="epsilon", variance=variance, timesteps=timesteps)
        return table.rows[:, 6].double()

    small = schedule.posterior_variance.sqrt().flip(0)
    torch.testing.assert_close(sigma("fixed_small"), small, rtol=1e-6, atol=1e-12)
    large = schedule.betas.sqrt().flip(0)
    torch.testing.assert_close(sigma("fixed_large")[:-1], large[:-1], rtol=1e-6, atol=0)
    for learned in ("learned", "learned_range"):
        assert sigma(learned).tolist() == [1.0] * 999 + [0.0]
    # Respaced: β = 1 − ᾱ/ᾱ′ of the list's own neighbours.
    ac = schedule.alphas_cumprod
    beta = 1 - ac[600] / ac[200]
    assert sigma("fixed_large", [600, 200])[0] == pytest.approx(beta.sqrt().item(), rel=1e-6)
    table = schedule.step_table(
        prediction="epsilon", variance="learned_range", timesteps=[600, 200]
    )
    posterior = beta * (1 - ac[200]) / (1 - ac[600])
    low, high = table.rows[:, 7].tolist(), table.rows[:, 8].tolist()
    assert low == pytest.approx([posterior.log().item()] * 2, rel=1e-6)
    assert high == pytest.approx([beta.log().item(), (1 - ac[200]).log().item()], rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(2000),
        NoiseSchedule.linear(4000),
        NoiseSchedule.cosine(4000),
        NoiseSchedule.constant(1000, 0.05),
        NoiseSchedule.constant(2000, 0.02),
        NoiseSchedule.jsd(),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_steps", [None, 50])
def test_tables_where_little_signal_is_left(schedule, num_steps):
    """Rounded once: β, β̃ and the posterior's weights against 60 digits, down to ᾱ of 1e-18."""
    mpmath.mp.dps = 60
    table = schedule.step_table(
        prediction="v_prediction", variance="fixed_large", num_steps=num_steps
    )
    alphas = [1 - mpmath.mpf(beta) for beta in schedule.betas.tolist()]
    bar = [mpmath.mpf(1)]
    for alpha in alphas:
        bar.append(bar[-1] * alpha)
    found, steps = columns(table), table.timesteps.tolist()
    for row in range(0, len(steps), max(1, len(steps) // 40)):
        now = bar[steps[row] + 1]
        prev = bar[steps[row + 1] + 1] if row + 1 < len(steps) else mpmath.mpf(1)
        beta = 1 - now / prev
        exact = {
            "b_0": mpmath.sqrt(prev) * beta / (1 - now),
            "b_x": mpmath.sqrt(now / prev) * (1 - prev) / (1 - now),
            "log_var_max": mpmath.log(beta),
        }
        if row + 1 < len(steps):
            exact["sigma"] = mpmath.sqrt(beta)
            exact["log_var_min"] = mpmath.log(beta * (1 - prev) / (1 - now))
        for name, value in exact.items():
            assert found[name][row] == pytest.approx(float(value), rel=7e-8, abs=1e-38), (name, row)


def test_no_float32_form_is_an_error():
    schedule = NoiseSchedule.constant(10_000, 0.02)
    with pytest.raises(ValueError, match="timestep 9999 has no float32 form"):
        schedule.step_table(prediction="epsilon", variance="fixed_small")
    tiny = NoiseSchedule.constant(9_000, 0.02)
    assert 0 < tiny.alphas_cumprod[-1] < 1e-77
    with pytest.raises(ValueError, match="timestep 8999 has no float32 form: alphas_cumprod is"):
        tiny.step_table(prediction="epsilon", variance="fixed_small")
    rows = schedule.step_table(prediction="sample", variance="fixed_small").rows
    assert rows.isfinite().all()


def test_tables_of_ones_own():
    """Nine numbers a step are a sampler; what the kernels could not read is refused."""
    rows, steps = torch.zeros(2, 9), torch.tensor([5, 1])
    names = ("epsilon", "fixed_small", "ddpm")
    assert len(StepTable(rows, steps, *names)) == 2
    for bad_rows, bad_steps, message in (
        (rows.double(), steps, r"rows must be float32 \[S, 9\]"),
        (rows[:, :8], steps, r"rows must be float32 \[S, 9\]"),
        (torch.zeros(9, 2).T, steps, "contiguous"),
        (rows, steps[:1], r"timesteps must be int64 \[2\]"),
        (rows, steps.int(), "timesteps must be int64"),
        (rows, steps.flip(0), "strictly decrease"),
        (rows, torch.tensor([2**24, 1]), "timesteps must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            StepTable(bad_rows, bad_steps, *names)


def test_schedules_do_not_depend_on_where_they_are_made():
    """Under inference mode, another default device, or fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(), torch.device("meta"):
        schedule = NoiseSchedule.linear(10)
        table = schedule.step_table(prediction="epsilon", variance="fixed_small")
        weights = schedule.forward_weights(torch.device("cpu"))
    for tensor in (schedule.betas, table.rows, table.timesteps, weights):
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()
    with FakeTensorMode(allow_non_fake_inputs=True):
        add_noise(torch.empty(1, 2), 3, schedule, seed=0)
    x0 = torch.zeros(1, 2, requires_grad=True)
    add_noise(x0, torch.tensor([3]), schedule, seed=0).sum().backward()
    assert x0.grad is not None


def test_numpy_integers_are_integers():
    schedule = NoiseSchedule.linear(np.int64(10))
    assert schedule.spaced_timesteps(np.int32(2)) == [5, 0]
    assert schedule.spaced_timesteps(timesteps=np.array([7, 3])) == [7, 3]
    ids = np.arange(2)
    z = randn([2, 3], seed=np.uint64(2**63), sample_ids=ids, stream=np.int8(3), index=np.int64(4))
    assert torch.equal(z, randn([2, 3], seed=2**63, sample_ids=[0, 1], stream=3, index=4))


def test_one_step_trajectories():
    for schedule in (NoiseSchedule([0.3]), NoiseSchedule.linear()):
        for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
            table = schedule.step_table(
                prediction="epsilon", variance=variance, timesteps=[len(schedule) - 1]
            )
            c = columns(table)
            assert (c["b_0"], c["b_x"], c["sigma"]) == (1, 0, 0)
            assert table.rows.isfinite().all()


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "not empty"),
        ([[0.1]], "one-dimensional"),
        ([0.1, 0.0], r"betas\[1\] is 0"),
        ([0.1, -0.1], r"betas\[1\]"),
        ([1.5], r"\(0, 1\]"),
        ([math.nan, 0.1], r"betas\[0\] is nan"),
        ([0.1, 1.0, 0.1], "only at the last"),
    ],
)
def test_bad_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(betas)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "eps"}, "prediction must be one of 'epsilon'"),
        ({"variance": "small"}, "variance must be one of 'fixed_small'"),
        ({"method": "euler"}, "method must be one of 'ddpm', 'ddim'"),
        ({"spacing": "even"}, "spacing must be one of 'leading'"),
        ({"eps_source": "x"}, "eps_source must be one of 'x0'"),
        ({"num_steps": 0}, "num_steps must be an integer in 1 … 10; got 0"),
        ({"num_steps": 11}, "num_steps must be an integer in 1 … 10; got 11"),
        ({"num_steps": 2.5}, "num_steps must be an integer"),
        ({"num_steps": True}, "num_steps must be an integer"),
        ({"timesteps": [7.9, 3.2]}, "timesteps must be an integer; got 7.9"),
        ({"timesteps": "95"}, "timesteps must be a list of integers"),
        ({"timesteps": 5}, "timesteps must be a list of integers"),
        ({"method": "ddim", "eta": "1"}, "eta must lie in 0 … 1"),
        ({"timesteps": []}, "not be empty"),
        ({"timesteps": [3, 3]}, "strictly decrease"),
        ({"timesteps": [1, 2]}, "strictly decrease"),
        ({"timesteps": [10, 2]}, "lie in 0 … 9"),
        ({"timesteps": [3, -1]}, "lie in 0 … 9"),
        ({"timesteps": [3], "num_steps": 1}, "not both"),
        ({"method": "ddim", "eta": 1.5}, "eta must lie in 0 … 1"),
        ({"method": "ddim", "eta": math.nan}, "eta must lie in 0 … 1"),
        ({"eta": 0.5}, "belong to method='ddim'"),
    ],
)
def test_bad_tables(arguments, message):
    schedule = NoiseSchedule.linear(10)
    with pytest.raises((ValueError, TypeError), match=message):
        schedule.step_table(**{"prediction": "epsilon", "variance": "fixed_small", **arguments})


@pytest.mark.parametrize("num_steps", [0, -3, 1.5])
def test_bad_lengths(num_steps):
    with pytest.raises((ValueError, TypeError), match="num_steps must be an integer"):
        NoiseSchedule.linear(num_steps)
