"""Accelerated OpenAI objects that are changed afterwards, as the stock ones are."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from openai_cases import PEERS, SHAPE, diffusion_of, images, loaded, model_of, start

from ddpm_fast import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")
T = torch.tensor([1, 5, 9, 3])
RANGE = ("EPSILON", "LEARNED_RANGE", "RESCALED_MSE")


def both(*choices, **more):
    """A stock object and an accelerated one that has made its tables."""
    stock = diffusion_of("guided", *choices, spacing="10", **more)
    fast = accelerate(diffusion_of("guided", *choices, spacing="10", **more), noise="torch")
    everything(fast, model_of(*choices[:2]))
    return stock, fast


def everything(diffusion, model, t=T):
    results = {}
    torch.manual_seed(0)
    for method, options in (("p_sample", {}), ("ddim_sample", {"eta": 0.5})):
        results[method] = getattr(diffusion, method)(model, start(), t, **options)["sample"]
        loop = getattr(diffusion, f"{method}_loop")
        results[f"{method}_loop"] = loop(model, SHAPE, device="cpu", **options)
    results["ddim_reverse"] = diffusion.ddim_reverse_sample(model, start(), t)["sample"]
    results["q_sample"] = diffusion.q_sample(images(), t)
    results |= diffusion.training_losses(model, images(), t)
    bounds = diffusion.calc_bpd_loop(model, images())
    results["prior"] = bounds["prior_bpd"]
    # Without t = 0, where float32 loses the digits of a decoder that is far off.
    return results | {f"bound's {k}": v[:, :-1] for k, v in bounds.items() if v.ndim == 2}


def assert_same(stock, fast, mean="EPSILON", variance="LEARNED_RANGE"):
    told = [], []
    found, expected = (
        everything(diffusion, model_of(mean, variance, seen))
        for diffusion, seen in zip((fast, stock), told, strict=True)
    )
    assert told[0] == told[1]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_KL"])
def test_losses_are_changed(loss):
    stock, fast = both(*RANGE)
    for diffusion in (stock, fast):
        diffusion.loss_type = loaded("guided").LossType[loss]
    assert_same(stock, fast)


def test_variances_and_means_are_changed():
    stock, fast = both(*RANGE)
    of = loaded("guided")
    for diffusion in (stock, fast):
        diffusion.model_var_type = of.ModelVarType.FIXED_LARGE
    assert_same(stock, fast, variance="FIXED_LARGE")
    for diffusion in (stock, fast):
        diffusion.model_mean_type = of.ModelMeanType.START_X
    assert_same(stock, fast, "START_X", "FIXED_LARGE")
    fast.model_mean_type = "VELOCITY"
    with pytest.raises(TypeError, match="model_mean_type must be one of EPSILON"):
        fast.p_sample(model_of(), start(), T)


@pytest.mark.filterwarnings("ignore:losses and bits/dim stay the stock formulas")
@pytest.mark.parametrize(
    "name",
    [
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "alphas_cumprod_next",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ],
)
def test_arrays_are_replaced(name):
    """One at a time: they may no longer follow from the betas, as the kernels of the losses have
    it."""
    stock, fast = both(*RANGE)
    before = everything(fast, model_of(*RANGE[:2]))
    for diffusion in (stock, fast):
        setattr(
            diffusion,
            name,
            np.append(getattr(diffusion, name)[0], 0.97 * getattr(diffusion, name)[1:]),
        )
    assert_same(stock, fast)
    after = everything(fast, model_of(*RANGE[:2]))
    assert any(not torch.equal(after[key], before[key]) for key in before)


@pytest.mark.filterwarnings("ignore:losses and bits/dim stay the stock formulas")
@pytest.mark.parametrize("name", ["sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"])
def test_arrays_of_losses_without_a_bound(name):
    stock, fast = both("EPSILON", "FIXED_SMALL")
    for diffusion in (stock, fast):
        setattr(diffusion, name, 0.9 * getattr(diffusion, name))
    assert_same(stock, fast, variance="FIXED_SMALL")


def test_whole_schedules_are_replaced():
    stock, fast = both(*RANGE)
    other = diffusion_of("guided", *RANGE, steps=30, spacing="12", rescale=True)
    for diffusion in (stock, fast):
        vars(diffusion).update(vars(other))
    assert_same(stock, fast)


@pytest.mark.filterwarnings("ignore:losses and bits/dim stay the stock formulas")
def test_arrays_that_are_written_to_count_when_accelerated_again():
    stock, fast = both(*RANGE)
    for diffusion in (stock, fast):
        diffusion.posterior_mean_coef1 *= 0.5
        diffusion.timestep_map[:] = [i + 1 for i in diffusion.timestep_map]
    assert accelerate(fast, noise="torch") is fast
    assert_same(stock, fast)
    tables, fast.loss_type = fast._tables, "L1"
    with pytest.raises(TypeError, match="loss_type must be one of"):
        accelerate(fast, seed=3)
    assert fast.noise_source.source == "torch"
    assert fast._tables_kept is tables


@pytest.mark.parametrize("name", PEERS)
def test_what_models_are_told_is_changed(name):
    of, told = diffusion_of(name, spacing="10"), ([], [])
    for fast, seen in enumerate(told):
        diffusion = copy.copy(of)
        diffusion = accelerate(diffusion) if fast else diffusion
        model = model_of(seen=seen)
        diffusion.p_sample(model, start(), T)
        for attribute, value in (
            ("rescale_timesteps", True),
            ("original_num_steps", 500),
            ("timestep_map", [3 * i for i in range(10)]),
        ):
            setattr(diffusion, attribute, value)
            diffusion.p_sample(model, start(), T)
            diffusion.training_losses(model, images(), T)
        diffusion.timestep_map.append(77)
        diffusion.p_sample(model, start(), T)
        wrapped = diffusion._wrap_model(model)  # keeps what it was made with
        diffusion.rescale_timesteps = False
        diffusion.p_sample(model, start(), T)
        diffusion.p_sample(wrapped, start(), T)
    assert told[0] == told[1]
    assert len({tuple(values) for _, values in told[0]}) == 5


def test_fewer_timesteps():
    stock, fast = both(*RANGE)
    for diffusion in (stock, fast):
        diffusion.num_timesteps = 6
    assert_same(stock, fast)
    for loss in ("MSE", "RESCALED_KL"):
        for diffusion in (stock, fast):
            diffusion.loss_type = loaded("guided").LossType[loss]
        assert_same(stock, fast)
    fast = accelerate(diffusion_of(steps=10))
    fast.num_timesteps = 11
    with pytest.raises(ValueError, match="step must lie in 0 … 9; got 10"):
        fast.p_sample_loop(model_of(), SHAPE, device="cpu")


def counted(diffusion, name, calls):
    """Puts a wrapper of the user's own in a method's place."""
    before = getattr(diffusion, name)

    def wrapper(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        return before(*args, **kwargs)

    setattr(diffusion, name, wrapper)


NAMES = [
    "p_sample",
    "ddim_sample",
    "q_sample",
    "p_sample_loop_progressive",
    "ddim_sample_loop_progressive",
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_eps_from_xstart",
    "_vb_terms_bpd",
    "_prior_bpd",
]


@pytest.mark.filterwarnings("ignore:this object has its own")
@pytest.mark.parametrize("name", NAMES)
def test_methods_that_are_set_on_the_object_are_called(name):
    stock, fast = both(*RANGE)
    calls = {}, {}
    for diffusion, count in zip((stock, fast), calls, strict=True):
        counted(diffusion, name, count)
    model = model_of(*RANGE[:2])
    assert_same(stock, fast)
    assert calls[0] == calls[1]
    assert calls[0][name] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(fast, model)


def test_one_warning_names_them():
    _, fast = both(*RANGE)
    model, calls = model_of(*RANGE[:2]), {}
    counted(fast, "p_sample", calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.p_sample(model, start(), T)  # passes over nothing that is there
        fast.ddim_sample_loop(model, SHAPE, device="cpu")
        fast.training_losses(model, images(), T)
    counted(fast, "p_mean_variance", calls)
    accelerate(fast)
    with pytest.warns(
        UserWarning, match=r"own p_mean_variance, p_sample: .* torch's noise"
    ) as seen:
        fast.p_sample_loop(model, SHAPE, device="cpu")
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(fast, model)
    del fast.p_sample, fast.p_mean_variance
    before = dict(calls)
    everything(fast, model)
    assert calls == before


@pytest.mark.filterwarnings("ignore:this object has its own p_sample")
def test_a_wrapped_step_keeps_the_addressed_noise():
    fast = accelerate(diffusion_of(spacing="10"), seed=4, sample_ids=[4, 2, 0, 9])
    expected = fast.p_sample_loop(model_of(), SHAPE, device="cpu")
    counted(fast, "p_sample", calls := {})
    found = fast.p_sample_loop(model_of(), SHAPE, device="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert calls == {"p_sample": 10}


@pytest.mark.filterwarnings("ignore:this object has its own")
def test_losses_and_bounds_keep_the_addressed_noise():
    fast = accelerate(diffusion_of("guided", *RANGE, spacing="10"), seed=4)
    model, results = model_of(*RANGE[:2]), []
    for _ in range(2):
        fast.set_noise(seed=4)
        results.append(fast.training_losses(model, images(), T))
        results[-1] |= fast.calc_bpd_loop(model, images())
        del results[-1]["mse"]  # of another scale at t = 0
        counted(fast, "p_mean_variance", {})
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2e-3)


def test_conditions_that_are_set_on_the_object():
    """They get the mean itself, as those of a subclass do."""
    found = []
    for diffusion in both(*RANGE):
        before = diffusion.condition_mean
        diffusion.condition_mean = lambda *args, before=before, **kwargs: (
            0.5 * before(*args, **kwargs)
        )
        torch.manual_seed(0)
        options = {"cond_fn": lambda x, t: x.cos(), "model_kwargs": {}}
        found.append(diffusion.p_sample(model_of(*RANGE[:2]), start(), T, **options)["sample"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
