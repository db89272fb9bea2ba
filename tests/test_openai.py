"""What accelerating an OpenAI object does to it, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from openai_cases import MEANS, PEERS, SHAPE, VARIANCES, diffusion_of, images, model_of, start

from ddpm_fast import NoiseSchedule, Sampler, accelerate
from ddpm_fast.integrations import openai

pytestmark = pytest.mark.usefixtures("one_thread")
T = torch.tensor([0, 5, 9, 1])
LOOPS = {"p_sample_loop": {}, "ddim_sample_loop": {"eta": 0.5}}


def exact_model(x, t, **kwargs):
    """Without a function that vectors and their remainders round differently."""
    return 0.5 * x + 0.001 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def samples_of(diffusion, method="p_sample_loop", model=exact_model, shape=SHAPE, **options):
    options = {**LOOPS[method], "device": "cpu", **options}
    return getattr(diffusion, method)(model, shape, **options)


@pytest.mark.parametrize("name", PEERS)
def test_it_is_the_same_object(name):
    for spacing in (None, "10"):
        diffusion = diffusion_of(name, spacing=spacing)
        stock, state = type(diffusion), dict(vars(diffusion))
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert accelerate(diffusion, noise="torch") is diffusion
        assert torch.equal(torch.get_rng_state(), before)
        assert isinstance(diffusion, stock)
        assert type(diffusion).__name__ == f"Fast{stock.__name__}"
        assert all(vars(diffusion)[key] is value for key, value in state.items())
        cls, torch_noise = type(diffusion), samples_of(diffusion)
        assert accelerate(diffusion, seed=4) is diffusion
        assert type(diffusion) is cls
        assert not torch.equal(samples_of(diffusion), torch_noise)


def test_copies_and_pickles():
    fast = accelerate(diffusion_of(spacing="10", rescale=True), seed=4)
    expected = samples_of(fast)
    for other in (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast)
        assert torch.equal(samples_of(other), expected)
        other.set_noise(seed=5)
        assert not torch.equal(samples_of(other), expected)
    assert torch.equal(samples_of(fast), expected)


def test_inference_mode_first():
    """Tables that are first made there may still be used by what is differentiated."""
    fast = accelerate(diffusion_of(spacing="10", rescale=True), seed=4)
    with torch.inference_mode():
        samples_of(fast, "ddim_sample_loop")
        fast.calc_bpd_loop(exact_model, images())
    x = start().requires_grad_()
    for method in (fast.p_sample, fast.ddim_sample, fast.ddim_reverse_sample):
        method(lambda x, t: exact_model(x, t).sin(), x, T)["sample"].sum().backward()
    gain = torch.ones((), requires_grad=True)
    fast.training_losses(lambda x, t: gain * exact_model(x, t), images(), T)[
        "loss"
    ].sum().backward()
    assert gain.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spacing", [None, "10"])
@pytest.mark.parametrize("name", PEERS)
def test_models_are_told_what_the_stock_code_tells(name, spacing, rescale):
    seen = {}
    for fast in (False, True):
        diffusion = diffusion_of(name, spacing=spacing, rescale=rescale, steps=30)
        diffusion = accelerate(diffusion) if fast else diffusion
        told = seen[fast] = []
        model = model_of(seen=told)
        samples_of(diffusion, model=model)
        samples_of(diffusion, "ddim_sample_loop", model)
        for t in (T, T.int()):
            diffusion.p_sample(model, start(), t)
            diffusion.training_losses(model, images(), t)
        if spacing is not None:
            diffusion.p_sample(diffusion._wrap_model(model), start(), T)
        diffusion.calc_bpd_loop(model, images())
    assert seen[True] == seen[False]
    wanted = openai.model_timesteps(diffusion)
    assert [(wanted.dtype, [value] * 4) for value in wanted.flip(0).tolist()] == seen[True][
        : len(wanted)
    ]


def test_a_users_own_wrapper_is_called_as_it_is():
    base = type(diffusion_of(spacing="10"))

    class Negated(base):
        def _wrap_model(self, model):
            return model if getattr(model, "wrapped", False) else Wrapper(model)

    class Wrapper:
        wrapped = True

        def __init__(self, model):
            self.model, self.calls = model, 0

        def __call__(self, x, ts, **kwargs):
            self.calls += 1
            return self.model(x, -ts, **kwargs)

    diffusion, told = diffusion_of(spacing="10"), []
    diffusion.__class__ = Negated
    samples_of(accelerate(diffusion), model=model_of(seen=told))
    assert [values for _, values in told] == [[-i] * 4 for i in reversed(range(10))]


def test_nothing_is_copied_to_the_device_in_a_step(monkeypatch):
    """torch.tensor and torch.from_numpy are how the stock code brings numbers there."""
    fast = accelerate(diffusion_of(variance="LEARNED_RANGE", spacing="10", rescale=True))
    model = model_of("EPSILON", "LEARNED_RANGE")
    samples_of(fast, model=model)
    samples_of(fast, "ddim_sample_loop", model)
    fast.ddim_reverse_sample(model, start(), T)

    def refused(*args, **kwargs):
        raise AssertionError("a copy from the host")

    for name in ("tensor", "from_numpy", "as_tensor"):
        monkeypatch.setattr(torch, name, refused)
    for options in ({}, {"denoised_fn": lambda x0: x0}):
        samples_of(fast, model=model, **options)
        samples_of(fast, "ddim_sample_loop", model, **options)
        fast.ddim_reverse_sample(model, start(), T, **options)
        fast.p_sample(model, start(), T, **options)
    fast.training_losses(model, images(), T)


@pytest.mark.parametrize("method", LOOPS)
@pytest.mark.parametrize("mean", MEANS[:2])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("spacing", [None, "10"])
def test_samples_are_samplers(spacing, variance, mean, method):
    """Sampler's rows are made in float64, theirs of float32 tables: the images are the same to
    what float32 loses."""
    fast = accelerate(diffusion_of("guided", mean, variance, spacing=spacing, rescale=True), seed=4)
    model = model_of(mean, variance)
    choices = {"method": "ddim", "eta": 0.5} if method == "ddim_sample_loop" else {}
    sampler = Sampler.from_pipeline(fast, model=model, **choices)
    found = sampler.sample(SHAPE, seed=4)
    torch.testing.assert_close(found, samples_of(fast, method, model), rtol=1e-4, atol=1e-4)


def test_fewer_steps_are_samplers_own():
    diffusion = diffusion_of(spacing="10", rescale=True, steps=40)
    told = []
    sampler = Sampler.from_pipeline(diffusion, model=model_of(seen=told), num_steps=5)
    sampler.sample(SHAPE)
    whole = openai.model_timesteps(diffusion)
    assert [values[0] for _, values in told] == whole[[8, 6, 4, 2, 0]].tolist()
    assert isinstance(sampler.schedule, NoiseSchedule)
    np.testing.assert_allclose(sampler.schedule.alphas_cumprod, diffusion.alphas_cumprod)


def is_refused(diffusion, error, message, **options):
    cls, state = type(diffusion), dict(vars(diffusion))
    with pytest.raises(error, match=message):
        accelerate(diffusion, **options)
    assert type(diffusion) is cls
    assert vars(diffusion) == state


def subclassed(diffusion, name="Own", **methods):
    diffusion.__class__ = type(name, (type(diffusion),), methods)
    return diffusion


@pytest.mark.parametrize("method", ["p_sample", "p_mean_variance", "q_sample", "_vb_terms_bpd"])
@pytest.mark.parametrize("spacing", [None, "10"])
def test_overridden_methods(method, spacing):
    def own(self, *args, **kwargs):
        raise AssertionError

    message = rf"\.Own has its own {method}, which acceleration would pass over; ddpm_fast knows im"
    is_refused(subclassed(diffusion_of(spacing=spacing), **{method: own}), TypeError, message)
    diffusion = diffusion_of(spacing=spacing)
    setattr(diffusion, method, lambda *args: None)
    is_refused(diffusion, TypeError, f"Diffusion has its own {method}")
    accelerate(subclassed(diffusion_of(spacing=spacing), another=own))


def test_other_copies_of_the_code():
    base = type(diffusion_of())

    def p_sample(self, model, x, t, clip_denoised=True, pred_xstart=None):
        raise AssertionError

    changed = subclassed(diffusion_of(), "GaussianDiffusion", p_sample=p_sample)
    message = r"which has p_sample\(model, x, t, clip_denoised, pred_xstart\); it knows improved"
    is_refused(changed, RuntimeError, message)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        mean, *rest = base.q_posterior_mean_variance(self, x_start, x_t, t)
        return 1.1 * mean, *rest

    changed = subclassed(
        diffusion_of(),
        "GaussianDiffusion",
        q_posterior_mean_variance=q_posterior_mean_variance,
    )
    message = r"p_sample does not compute what OpenAI's does \('sample' differs\)"
    is_refused(changed, RuntimeError, message)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loss", ["RESCALED_MSE", "RESCALED_KL"])
def test_the_trial_of_formulas_passes_for_every_schedule(loss, mean, variance):
    """Long and short ones; cosine, whose last steps multiply by 10⁴."""
    from openai_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

    u = (np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2
    cosine = np.minimum(1 - np.cos(u[1:]) ** 2 / np.cos(u[:-1]) ** 2, 0.999)
    for betas in (cosine, cosine[::-1][:1000][::-1], np.linspace(1e-4, 0.02, 1000), [0.1, 0.3]):
        diffusion = GaussianDiffusion(
            betas=betas,
            model_mean_type=ModelMeanType[mean],
            model_var_type=ModelVarType[variance],
            loss_type=LossType[loss],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            accelerate(diffusion)


def test_unknown_members_arrays_and_options():
    diffusion = diffusion_of()
    diffusion.model_mean_type = "VELOCITY"
    is_refused(diffusion, TypeError, "model_mean_type must be one of EPSILON, .*; got 'VELOCITY'")
    diffusion = diffusion_of()
    diffusion.posterior_variance = diffusion.posterior_variance[1:]
    is_refused(diffusion, TypeError, r"posterior_variance must be a numpy array of 20 .* \[19\]")
    is_refused(diffusion_of(), TypeError, "memory_format", memory_format=torch.channels_last)
    is_refused(diffusion_of(), ValueError, "noise must be one of", noise="numpy")


def test_models_of_another_shape():
    fast = accelerate(diffusion_of(variance="LEARNED"))
    message = r"shape \[4, 4, 3, 5\], its variance being learned; got \[4, 2, 3, 5\]"
    with pytest.raises(ValueError, match=message):
        fast.p_sample(lambda x, t: x, start(), T)
    with pytest.raises(ValueError, match="got NoneType"):
        fast.training_losses(lambda x, t: None, images(), T)


def test_samplers_need_a_model_and_a_known_mean():
    with pytest.raises(TypeError, match="GaussianDiffusion holds no model: give model="):
        Sampler.from_pipeline(diffusion_of())
    with pytest.raises(ValueError, match=r"predicts x_\{t-1\} \(PREVIOUS_X\)"):
        Sampler.from_pipeline(diffusion_of(mean="PREVIOUS_X"), model=model_of())


def test_stock_formulas_warn_once():
    fast = accelerate(diffusion_of(mean="PREVIOUS_X"))
    model = model_of("PREVIOUS_X")
    with pytest.warns(UserWarning, match=r"stay the stock formulas: .*\(PREVIOUS_X\)"):
        fast.training_losses(model, images(), T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.training_losses(model, images(), T)
        fast.calc_bpd_loop(model, images())
        samples_of(fast, model=model)


def test_zero_terminal_snr():
    """ᾱ = 0 at the last timestep: x̂₀ of ε is ±∞ there, and clipped; the bound stays theirs."""
    from openai_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

    betas = np.append(np.linspace(1e-3, 0.2, 9), 1.0)
    choices = {"model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.KL}
    for mean in ("START_X", "EPSILON"):
        with np.errstate(all="ignore"):
            stock, fast = (
                GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType[mean], **choices)
                for _ in range(2)
            )
        accelerate(fast, noise="torch")
        results = []
        for diffusion in (stock, fast):
            torch.manual_seed(0)
            results.append(samples_of(diffusion, noise=start()))
        held = ~results[0].isnan()
        torch.testing.assert_close(results[1][held], results[0][held], rtol=1e-4, atol=1e-5)
        assert results[1].isfinite().all()
    with pytest.warns(UserWarning, match="timestep 9 has no float32 form"):
        fast.training_losses(exact_model, images(), T)
