"""The fast schedulers as objects of diffusers: config, disk, copies, timesteps, changes, errors."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput  # noqa: E402
from fast_scheduler_cases import (  # noqa: E402
    BOTH,
    FAST,
    SHAPE,
    check_step,
    check_trajectory,
    generator,
    output_of_model,
    pair,
)

from ddpm_fast import accelerate, randn, use_backend  # noqa: E402
from ddpm_fast.integrations import diffusers as integration  # noqa: E402
from ddpm_fast.integrations.accelerated import Accelerated  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

X, M = randn(SHAPE, seed=1), output_of_model(0)


def same_step(one, two, t=500):
    """Whether two schedulers take the same step."""
    return torch.equal(*(s.step(M, t, X, generator=generator(1)).prev_sample for s in (one, two)))


@pytest.mark.parametrize("stock", BOTH)
def test_signatures_are_the_stock_ones(stock):
    for name in ("__init__", "step", "set_timesteps", "add_noise", "get_velocity"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (FAST[stock], stock))
        assert [p.replace(annotation=p.empty) for p in ours.parameters.values()][1:] == [
            p.replace(annotation=p.empty) for p in theirs.parameters.values()
        ][1:] or name == "set_timesteps"
        assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("stock", BOTH)
def test_configs_load_both_ways(stock, tmp_path):
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    one, two = pair(stock, **config)
    assert dict(one.config) == dict(two.config)
    two.set_timesteps(10)
    two.step(M, 500, X)
    two.save_pretrained(tmp_path / "fast")
    one.save_pretrained(tmp_path / "stock")
    texts = [(tmp_path / n / "scheduler_config.json").read_text() for n in ("fast", "stock")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["_class_name"] == stock.__name__
    for cls in (stock, FAST[stock]):
        loaded = [cls.from_pretrained(tmp_path / name) for name in ("fast", "stock")]
        loaded += [cls.from_config(scheduler.config) for scheduler in (one, two)]
        for scheduler in loaded:
            assert type(scheduler) is cls
            assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
            assert torch.equal(scheduler.alphas_cumprod, one.alphas_cumprod)
    for other in BOTH:
        assert FAST[other].from_config(two.config).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_copies_are_fast_and_their_own(stock, how):
    _, fast = pair(stock, 20)
    fast.set_noise(seed=5)
    fast.step(M, 500, X)
    make = {"pickle": lambda s: pickle.loads(pickle.dumps(s)), "deepcopy": copy.deepcopy}
    copied = make.get(how, copy.copy)(fast)
    assert type(copied) is type(fast) is FAST[stock]
    assert copied.noise_source.seed == 5
    assert dict(copied.config) == dict(fast.config)
    assert torch.equal(copied.step(M, 500, X).prev_sample, fast.step(M, 500, X).prev_sample)
    copied.set_timesteps(5)
    assert len(fast.timesteps) == 20
    assert "_plan" not in copied.__getstate__()


class Mine(FAST[DDPMScheduler]):
    """A user's own subclass."""

    def _threshold_sample(self, sample):
        return sample.clamp(-0.25, 0.25)


def test_subclasses_keep_their_name_and_their_methods():
    mine = Mine(thresholding=True)
    assert mine.step(M, 500, X).pred_original_sample.abs().max() == 0.25
    copied = copy.deepcopy(mine)
    assert type(copied) is Mine
    assert Mine.__module__ == __name__
    assert accelerate(mine, seed=3) is mine
    assert mine.noise_source.seed == 3


def test_what_diffusers_sees():
    for stock, fast in FAST.items():
        assert fast.__name__ == stock.__name__
        assert fast.__module__ == stock.__module__
        assert issubclass(fast, Accelerated)
        assert getattr(integration, f"Fast{stock.__name__}") is fast
    with pytest.raises(AttributeError, match="FastPNDM"):
        _ = integration.FastPNDMScheduler


def test_outputs():
    _, fast = pair(DDPMScheduler)
    out = fast.step(M, 500, X, generator())
    assert type(out) is DDPMSchedulerOutput
    as_tuple = fast.step(M, 500, X, generator(), return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], out.prev_sample)
    assert torch.equal(as_tuple[1], out.pred_original_sample)
    assert not torch.equal(out.prev_sample, X)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize(
    "same",
    [
        np.int64(500),
        np.int32(500),
        torch.tensor(500),
        torch.tensor([500]),
        torch.tensor(500, dtype=torch.int32),
        torch.full((2,), 500),
    ],
    ids=["numpy", "numpy 32", "0-d", "[1]", "32 bits", "[N]"],
)
def test_timesteps_of_any_kind(stock, same):
    _, fast = pair(stock, 20)
    expected = fast.step(M, 500, X, generator=generator())
    out = fast.step(M, same, X, generator=generator())
    assert torch.equal(out.prev_sample, expected.prev_sample)
    assert torch.equal(out.pred_original_sample, expected.pred_original_sample)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("limit", [{}, {"thresholding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_timestep_a_sample(stock, limit, dtype):
    _, fast = pair(stock, 10, **limit)
    more = {"eta": 0.5} if stock is DDIMScheduler else {}
    x, m = (randn((4, 3, 6, 5), seed=seed).to(dtype) for seed in (1, 2))
    t = torch.tensor([900, 0, 300, 900])
    fast.set_noise(seed=7, sample_ids=[5, 6, 7, 8])
    together = fast.step(m, t, x, **more)
    for i in range(4):
        fast.set_noise(seed=7, sample_ids=[5 + i])
        alone = fast.step(m[i : i + 1], int(t[i]), x[i : i + 1], **more)
        for name in ("prev_sample", "pred_original_sample"):
            difference = getattr(together, name)[i] - getattr(alone, name)[0]
            assert difference.abs().max() < (1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(
        fast.step(m, t * 0, x, generator=(g := generator())).prev_sample,
        fast.step(m, 0, x).prev_sample,
    )
    assert torch.equal(g.get_state(), generator().get_state())  # all at t = 0: nothing to draw


@pytest.mark.parametrize(
    ("t", "error", "words"),
    [
        (-1, ValueError, r"timestep must lie in 0 … 999; got -1"),
        (1000, ValueError, r"0 … 999; got 1000"),
        (501, ValueError, r"timestep 501 is not one of the scheduler's 20: 950, 900, 850, …"),
        (torch.tensor(501), ValueError, "timestep 501 is not one"),
        (torch.tensor([500, 501]), ValueError, "timestep 501 is not one"),
        (torch.tensor([500, 1000]), ValueError, "0 … 999; got 1000"),
        (torch.tensor([500, 500, 500]), ValueError, r"one a sample, \[2\]; got \[3\]"),
        (torch.tensor(500.0), TypeError, "timestep must be an integer; got 500.0"),
        (500.0, TypeError, "timestep"),
        ("500", TypeError, "timestep"),
        (None, TypeError, "timestep"),
    ],
)
def test_timesteps_that_are_none(t, error, words):
    _, fast = pair(DDPMScheduler, 20)
    with pytest.raises(error, match=words):
        fast.step(M, t, X)


@pytest.mark.parametrize(
    ("m", "x", "words"),
    [
        (M[:1], X, r"must have shape \[2, 3, 6, 5\].*got \[1, 3, 6, 5\]"),
        (M[:, :1], X, r"got \[2, 1, 6, 5\]"),
        (torch.cat([M, M], 1), X, r"this variance_type; got \[2, 6, 6, 5\]"),
        (M.to("meta"), X, "model_output must be on cpu, as sample is; got meta"),
    ],
)
def test_shapes_and_devices_that_do_not_match(m, x, words):
    _, fast = pair(DDPMScheduler)
    with pytest.raises(ValueError, match=words):
        fast.step(m, 500, x)


def test_channels_of_learned_variances():
    _, fast = pair(DDPMScheduler, variance_type="learned_range")
    with pytest.raises(ValueError, match=r"shape \[2, 6, 6, 5\].*got \[2, 3, 6, 5\]"):
        fast.step(M, 500, X)
    _, fast = pair(DDPMScheduler, variance_type="learned")
    with pytest.raises(ValueError, match=r"shape \[2, 6, 6, 5\].*got \[2, 3, 6, 5\]"):
        fast.step(M, 500, X)


def test_integers_are_no_samples():
    _, fast = pair(DDPMScheduler)
    with pytest.raises(TypeError, match="floating point"):
        fast.step(M.long(), 500, X.long())


def test_what_raises_in_the_stock_step_raises_its_words():
    _, fast = pair(DDPMScheduler, prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type given as flow"):
        fast.step(M, 500, X)
    _, fast = pair(DDIMScheduler)
    with pytest.raises(ValueError, match="run 'set_timesteps'"):
        fast.step(M, 500, X)


def test_a_variance_that_the_kernels_do_not_serve_is_served_with_one_warning():
    stock, fast = pair(DDPMScheduler, 5, variance_type="learned_range")
    for scheduler in (stock, fast):
        scheduler.variance_type = "learned"
    m = output_of_model(0, doubled=True)
    with pytest.warns(RuntimeWarning, match="config says variance_type='learned_range'"):
        fast.step(m, 800, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in fast.timesteps:
            results = [s.step(m, t, X, generator()).prev_sample for s in (stock, fast)]
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


CHANGES = {
    "alphas_cumprod": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "timesteps": lambda s: setattr(s, "timesteps", torch.tensor([900, 500, 100])),
    "timesteps in place": lambda s: s.timesteps[-2].fill_(3),
    "set_timesteps": lambda s: s.set_timesteps(4),
    "config": lambda s: s.register_to_config(clip_sample_range=0.1, prediction_type="sample"),
    "last ᾱ": lambda s: (getattr(s, "one", None) or s.final_alpha_cumprod).mul_(0.99),
}


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_noticed(stock, change, inference):
    with torch.inference_mode(inference):
        schedulers = pair(stock, 20)
        check_step(*schedulers, M, 500, X)
        for scheduler in schedulers:
            CHANGES[change](scheduler)
        if "timesteps in" in change and stock is DDPMScheduler:
            check_step(*schedulers, M, 3, X)
        if change != "set_timesteps":
            check_step(*schedulers, M, 500, X)
        check_step(*schedulers, M, int(schedulers[0].timesteps[-1]), X)


def test_a_variance_type_set_later_is_noticed():
    stock, fast = pair(DDPMScheduler, 20)
    check_step(stock, fast, M, 500, X)
    for scheduler in (stock, fast):
        scheduler.variance_type = "fixed_small_log"
    check_step(stock, fast, M, 500, X)
    assert not same_step(fast, FAST[DDPMScheduler]())


def test_what_was_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        fast = FAST[DDPMScheduler]()
        fast.set_timesteps(10)
        fast.step(M, 500, X)
    x = X.clone().requires_grad_()
    fast.step(M, 500, x).prev_sample.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["channels_last", "strided", "permuted"])
def test_layouts(layout):
    stock, fast = pair(DDPMScheduler)
    x = torch.empty(6, 5, 3, 2).permute(3, 2, 0, 1)  # as diffusers' own tests have them
    x.copy_(X)
    if layout == "channels_last":
        x = X.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.cat([X, X], -1)[..., :5]
    check_trajectory(stock, fast, steps=[999, 500, 0])
    assert torch.equal(
        fast.step(M, 500, x, generator()).prev_sample, fast.step(M, 500, X, generator()).prev_sample
    )


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 7), (2, 3, 2, 4, 5), (0, 3, 4, 4)])
def test_shapes(shape):
    stock, fast = pair(DDPMScheduler)
    x, m = torch.randn(shape), torch.randn(shape)
    theirs, ours = (s.step(m, 500, x, generator()).prev_sample for s in (stock, fast))
    assert (theirs - ours).abs().sum() < 1e-5
    assert ours.shape == shape


def test_the_reference_backend():
    _, fast = pair(DDPMScheduler)
    expected = fast.step(M, 500, X, generator()).prev_sample
    with use_backend("reference"):
        assert (fast.step(M, 500, X, generator()).prev_sample - expected).abs().max() < 1e-6


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stock in BOTH:
            check_trajectory(*pair(stock, 3))
