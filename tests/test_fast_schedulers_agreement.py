"""The fast schedulers beside the stock ones: every step of whole trajectories, in one process."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import (  # noqa: E402
    BOTH,
    SHAPE,
    check_step,
    check_trajectory,
    generator,
    output_of_model,
    pair,
)
from helpers import ulp  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ddpm_fast import randn  # noqa: E402
from ddpm_fast.integrations.diffusers import steps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other"]
LIMITS = {
    "clip": {},
    "wider clip": {"clip_sample_range": 1.7},
    "free": {"clip_sample": False},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
}


def learned(variance):
    return variance in ("learned", "learned_range")


def positive(m):
    """A model's output whose second half can be a variance."""
    m[:, SHAPE[1] :] = 0.01 * m[:, SHAPE[1] :].abs()
    return m


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction, variance, limit):
    config = {"prediction_type": prediction, "variance_type": variance, **LIMITS[limit]}
    stock, fast = pair(DDPMScheduler, 25, **config)
    if variance == "learned":
        x = randn(SHAPE, seed=5)
        for row, t in enumerate(stock.timesteps):
            m = positive(output_of_model(row, doubled=True))
            x = check_step(stock, fast, m, t, x).prev_sample
    else:
        check_trajectory(stock, fast, doubled=learned(variance))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clipped", [None, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction, clipped, eta, limit):
    stock, fast = pair(DDIMScheduler, 25, prediction_type=prediction, **LIMITS[limit])
    check_trajectory(stock, fast, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", BETAS)
def test_schedules(stock, betas, zero_snr, spacing):
    config = {
        "beta_schedule": betas,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
        "prediction_type": "v_prediction" if zero_snr else "epsilon",
    }
    check_trajectory(*pair(stock, 7, **config))


@pytest.mark.parametrize("betas", ["sigmoid", "laplace"])
def test_schedules_of_ddpm_alone(betas):
    check_trajectory(*pair(DDPMScheduler, 9, beta_schedule=betas))


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("clip", [True, False])
def test_zero_snr_with_epsilon_divides_by_zero_as_the_stock_step_does(stock, clip):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": clip}
    check_trajectory(*pair(stock, 5, **config))


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [3, 7, 50])
def test_ddim_takes_its_own_previous_timestep(num_steps, offset, to_one):
    """T − T//n, which is not the list's next where n does not divide T."""
    config = {"steps_offset": offset, "set_alpha_to_one": to_one, "beta_start": 0.01}
    check_trajectory(*pair(DDIMScheduler, num_steps, **config), eta=0.7)


def test_the_last_of_few_trailing_steps_is_noisy():
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large"}
    stock, fast = pair(DDPMScheduler, 7, **config)
    assert stock.timesteps[-1] > 0
    check_trajectory(stock, fast)
    x, m, t = randn(SHAPE, seed=1), output_of_model(0), stock.timesteps[-1]
    one, two = (fast.step(m, t, x, generator(seed)).prev_sample for seed in (1, 2))
    assert (one - two).std() > 0.1


def test_the_least_variance_is_not_zero():
    """A learned range begins at log 1e-20 where the previous ᾱ is 1."""
    config = {"timestep_spacing": "trailing", "variance_type": "learned_range"}
    stock, fast = pair(DDPMScheduler, 7, **config)
    t, x, m = stock.timesteps[-1], randn(SHAPE, seed=1), output_of_model(0, doubled=True)
    check_step(stock, fast, m, t, x)
    one, two = (fast.step(m, t, x, generator(seed)).prev_sample for seed in (1, 2))
    assert 0.01 < (one - two).std() < 0.3


@pytest.mark.parametrize("eta", [-0.5, 1.2])
def test_an_eta_out_of_its_range(eta):
    """No noise where it is negative; NaN where the noise is more than there is room for."""
    stock, fast = pair(DDIMScheduler, 6, beta_end=0.2)
    check_trajectory(stock, fast, eta=eta)


def test_the_root_of_a_logarithm_is_nan_there_and_here():
    stock, fast = pair(DDPMScheduler, 4, variance_type="fixed_large_log")
    check_trajectory(stock, fast)
    x, m = randn(SHAPE, seed=1), output_of_model(0)
    assert fast.step(m, stock.timesteps[0], x, generator()).prev_sample.isnan().all()
    assert not fast.step(m, 0, x, generator()).prev_sample.isnan().any()


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("beta_end", [0.2, 2.0])
def test_tables_that_turn_nan(stock, beta_end):
    check_trajectory(*pair(stock, 20, beta_start=0.1, beta_end=beta_end))


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("num_train", [1, 2, 10])
def test_few_training_timesteps(stock, num_train):
    check_trajectory(*pair(stock, num_train, num_train_timesteps=num_train))


@pytest.mark.parametrize("stock", BOTH)
def test_trained_betas_of_another_length_than_the_configs(stock):
    config = {"trained_betas": [0.001 * i for i in range(1, 81)], "num_train_timesteps": 60}
    check_trajectory(*pair(stock, 7, **config))


def test_without_set_timesteps_ddpm_takes_them_all():
    stock, fast = pair(DDPMScheduler)
    check_trajectory(stock, fast, steps=[999, 998, 500, 1, 0])


def test_custom_timesteps():
    stock, fast = pair(DDPMScheduler)
    for scheduler in (stock, fast):
        scheduler.set_timesteps(timesteps=[900, 450, 449, 20, 3])
    check_trajectory(stock, fast)


def test_a_list_that_holds_a_timestep_twice():
    """The stock step goes on from its first place."""
    stock, fast = pair(DDPMScheduler, 20)
    for scheduler in (stock, fast):
        scheduler.timesteps = torch.tensor([900, 500, 300, 500, 100, 900])
    check_trajectory(stock, fast)


@pytest.mark.slow
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_of_long_ddpm_trajectories(prediction, variance, betas):
    config = {"prediction_type": prediction, "beta_schedule": betas, "variance_type": variance}
    check_trajectory(*pair(DDPMScheduler, 1000, **config), doubled=learned(variance))


@pytest.mark.slow
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_of_long_ddim_trajectories(prediction, clipped, eta, betas):
    config = {"prediction_type": prediction, "beta_schedule": betas}
    arguments = {"eta": eta, "use_clipped_model_output": clipped}
    check_trajectory(*pair(DDIMScheduler, 1000, **config), **arguments)


@pytest.mark.parametrize("use", ["fixed_small", "fixed_small_log", "learned", "learned_range"])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "fixed_small_log"])
def test_a_variance_type_other_than_the_configs(kind, use):
    """The step asks the attribute, and the variance comes from the config."""
    stock, fast = pair(DDPMScheduler, 5, variance_type=kind)
    for scheduler in (stock, fast):
        scheduler.variance_type = use
    check_trajectory(stock, fast)
    if learned(use):
        check_trajectory(stock, fast, doubled=True)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
    ids=lambda pair: "-".join(str(dtype).removeprefix("torch.") for dtype in pair),
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", LIMITS)
def test_dtypes_promote_as_in_the_stock_step(stock, dtypes, prediction, limit):
    stock, fast = pair(stock, 4, prediction_type=prediction, **LIMITS[limit])
    x = randn(SHAPE, seed=5).to(dtypes[0])
    arguments = {"eta": 0.5} if isinstance(stock, DDIMScheduler) else {}
    for row, t in enumerate(stock.timesteps):
        check_step(stock, fast, output_of_model(row).to(dtypes[1]), t, x, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("limit", LIMITS)
def test_variances_that_the_model_has_learned_in_any_dtype(dtype, limit, monkeypatch):
    """σ² itself: the kernels take its root with the noise. Zero is no noise, below it is NaN."""
    calls = []
    real = steps.reverse_step_now
    monkeypatch.setattr(steps, "reverse_step_now", lambda *a: calls.append(a) or real(*a))
    stock, fast = pair(DDPMScheduler, 6, variance_type="learned", **LIMITS[limit])
    x = randn(SHAPE, seed=5).to(dtype)
    for row, t in enumerate(stock.timesteps):
        m = positive(output_of_model(row, doubled=True)).to(dtype)
        m[0, SHAPE[1], 0] = 0
        if row == 3:
            m[1, SHAPE[1] + 1, 2] = -0.5
        check_step(stock, fast, m, t, x)
    assert len(calls) == (0 if dtype == torch.float64 else 6)
    fast.set_noise(seed=4)
    noise = randn(SHAPE, seed=4, stream=1, index=500)
    m = positive(output_of_model(0, doubled=True)).to(dtype)
    fast.set_timesteps(10)
    with_noise = fast.step(m, 500, x).prev_sample
    m0 = m.clone()
    m0[:, SHAPE[1] :] = 0
    without = fast.step(m0, 500, x).prev_sample
    expected = without.double() + m[:, SHAPE[1] :].double().sqrt() * noise.double()
    assert (with_noise.double() - expected).abs().max() <= 2 * ulp(dtype) * expected.abs().max()


def test_tables_in_float64():
    stock, fast = pair(DDPMScheduler, 10)
    for scheduler in (stock, fast):
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    check_trajectory(stock, fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_given_to_ddim(dtype):
    stock, fast = pair(DDIMScheduler, 5)
    for noise in (torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE[1:], dtype=dtype)):
        check_trajectory(stock, fast, eta=1.0, variance_noise=noise)


CONFIGS = {
    "num_train_timesteps": st.sampled_from([30, 100, 1000]),
    "beta_schedule": st.sampled_from(BETAS),
    "beta_end": st.sampled_from([0.02, 0.2]),
    "prediction_type": st.sampled_from(PREDICTIONS),
    "clip_sample": st.booleans(),
    "clip_sample_range": st.sampled_from([0.5, 1.0, 3.0]),
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.sampled_from([0.5, 0.995]),
    "sample_max_value": st.sampled_from([0.5, 1.0, 2.0]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
    "rescale_betas_zero_snr": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(CONFIGS),
    st.sampled_from([kind for kind in VARIANCES if kind != "learned"]),
    st.integers(1, 30),
)
def test_any_ddpm(config, variance, num_steps):
    stock, fast = pair(DDPMScheduler, num_steps, variance_type=variance, **config)
    check_trajectory(stock, fast, doubled=learned(variance))


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({**CONFIGS, "set_alpha_to_one": st.booleans()}),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(1, 30),
)
def test_any_ddim(config, eta, clipped, num_steps):
    stock, fast = pair(DDIMScheduler, num_steps, **config)
    check_trajectory(stock, fast, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75, 0.9, 0.995, 1.0])
def test_thresholds_to_the_bit(ratio, most, dtype):
    """The quantile by the largest elements alone is the one by sorting."""
    config = {"dynamic_thresholding_ratio": ratio, "sample_max_value": most}
    stock, fast = pair(DDPMScheduler, thresholding=True, **config)
    for shape in [(3, 3, 7, 11), (2, 1, 1, 1), (1, 2, 1, 1), (2, 3, 16, 16)]:
        x0 = 2 * randn(shape, seed=4).to(dtype)
        x0[-1].view(-1)[0] = 3.5
        assert torch.equal(fast._thresholded(x0), stock._threshold_sample(x0))
    x0[0, 0, 0, 0], x0[1, 0, 0, 0] = torch.nan, torch.inf
    ours, theirs = fast._thresholded(x0), stock._threshold_sample(x0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours[0].isnan().all()


def test_a_ratio_that_is_none_raises_as_there():
    _, fast = pair(DDPMScheduler, thresholding=True, dynamic_thresholding_ratio=1.5)
    with pytest.raises(RuntimeError, match="quantile"):
        fast.step(output_of_model(0), 500, randn(SHAPE, seed=1))


def walk(scheduler, prediction, **arguments):
    """With the best model of images that are N(0, ¼), told the timestep, and not quite linear."""
    kernel = randn((3, 3, 3, 3), seed=8)
    cumprod = scheduler.alphas_cumprod.tolist()
    torch.manual_seed(3)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps:
        signal, noise = cumprod[t] ** 0.5, (1 - cumprod[t]) ** 0.5
        x0 = signal * x / (signal**2 + 4 * noise**2)
        x0 = x0 + 0.2 * torch.tanh(torch.nn.functional.conv2d(x0, kernel, padding=1))
        eps = (x - signal * x0) / noise
        m = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[prediction]
        x = scheduler.step(m, t, x, **arguments).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [20, 1000])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("stock", BOTH)
def test_end_to_end_with_torchs_noise(stock, prediction, num_steps):
    """The same torch.manual_seed gives the same images, the model's answers fed back and all."""
    stock, fast = pair(stock, num_steps, prediction_type=prediction)
    fast.set_noise("torch")
    arguments = {"eta": 0.8} if isinstance(stock, DDIMScheduler) else {}
    theirs, ours = (walk(scheduler, prediction, **arguments) for scheduler in (stock, fast))
    assert (theirs - ours).abs().max() < 2e-5
    assert 0.2 < theirs.std() < 1
