"""bits_per_dim: against improved-diffusion's loop, against closed forms, and what it depends on.

Statistics use fixed seeds; each bound states how often a fresh seed would break it."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from openai_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

from ddpm_fast import NoiseSchedule, bits_per_dim, randn, reference
from ddpm_fast.likelihood import _strata

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
SCHEDULE = NoiseSchedule.linear(40, 1e-4, 0.3)
SHAPE = (5, 2, 4, 3)


def images(shape=SHAPE):
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    levels[:1, :, 0], levels[:1, :, 1] = 0, 255  # both open bins
    return levels.to(torch.uint8)


def unit(dtype, shape=SHAPE):
    return (images(shape).double() / 127.5 - 1).to(dtype)


def model_of(prediction="epsilon", variance="fixed_small"):
    """Smooth, near enough for the decoder, with a variance that a model may have come to."""

    def model(x, t):
        position = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 40
        gain = {"epsilon": 0.2 + 0.8 * position, "sample": 1 - position}.get(prediction, -0.1)
        m = gain * x + 0.05 * position * torch.sin(3 * x)
        if variance == "learned":
            return torch.cat([m, -7 + 4 * position + 0.3 * torch.cos(x)], 1)
        return torch.cat([m, torch.sin(x + position)], 1) if variance == "learned_range" else m

    return model


def their_loop(model, prediction, variance, x0, noise, clip_denoised):
    """calc_bpd_loop of improved-diffusion in float64, with the noise of each timestep. It has no v
    prediction: there the model is told to predict ε by way of v."""
    diffusion = GaussianDiffusion(
        betas=np.linspace(1e-4, 0.3, 40),
        model_mean_type=ModelMeanType.START_X if prediction == "sample" else ModelMeanType.EPSILON,
        model_var_type=ModelVarType[variance.upper()],
        loss_type=LossType.KL,
    )
    diffusion.coefficients = torch.float64

    def of_v(x, t):
        v, *rest = model(x, t).split(x.shape[1], 1)
        return torch.cat([reference.eps_from_v(x, v, t, SCHEDULE), *rest], 1)

    drawn = reversed(noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(drawn))
        used = of_v if prediction == "v_prediction" else model
        return diffusion.calc_bpd_loop(used, x0, clip_denoised=clip_denoised)


def noises(shape, num_steps, seed, ids=None):
    return [
        randn(shape, seed=seed, sample_ids=ids, stream=4, index=t).double()
        for t in range(num_steps)
    ]


@pytest.mark.parametrize("clip", [(-1.0, 1.0), None])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_improved_diffusions_loop(prediction, variance, clip):
    """Both in float64, to 1e-5; the total and each of its parts."""
    model, x0 = model_of(prediction, variance), unit(torch.float64)
    found = bits_per_dim(
        model, x0, SCHEDULE, prediction=prediction, variance=variance, clip=clip, seed=3, cdf="tanh"
    )
    theirs = their_loop(model, prediction, variance, x0, noises(SHAPE, 40, 3), clip is not None)
    assert found.total.dtype == torch.float64
    np.testing.assert_allclose(found.total, theirs["total_bpd"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.prior, theirs["prior_bpd"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        found.vlb.flip(1)[:, :-1], theirs["vb"][:, :-1], rtol=1e-7, atol=1e-9
    )
    np.testing.assert_allclose(found.vlb[:, 0], theirs["vb"][:, -1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.mse.flip(1), theirs["mse"], rtol=1e-7, atol=1e-9)
    assert found.standard_error.tolist() == [0.0] * 5


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_and_pixels_agree_with_float64(prediction, variance, cdf):
    choices = {"prediction": prediction, "variance": variance, "cdf": cdf, "seed": 3}
    model = model_of(prediction, variance)
    exact = bits_per_dim(model, unit(torch.float64), SCHEDULE, **choices)
    for x0 in (unit(torch.float32), images()):
        found = bits_per_dim(model, x0, SCHEDULE, **choices)
        assert found.total.dtype == found.vlb.dtype == torch.float32
        # The tanh's tails are differences of numbers near 1.
        tolerance = 1e-4 if cdf == "exact" else 5e-2
        torch.testing.assert_close(found.total.double(), exact.total, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(
            found.vlb[:, 1:].double(), exact.vlb[:, 1:], rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(found.prior.double(), exact.prior, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.mse.double(), exact.mse, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            found.total.double(),
            found.prior.double() + found.vlb.double().sum(1),
            rtol=1e-6,
            atol=0,
        )


# Known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decoder_and_kl_of_known_answers(golden, dtype):
    """A model that predicts x_0 steers the decoder's mean, one with learned variance its width.
    At t = 0 the mean is x̂₀; at t = 1 it is coef1 x̂₀ + coef2 x_1, whose KL follows by hand."""
    schedule = NoiseSchedule([0.01, 0.02])
    for known in golden["decoder_nll"]:
        mean, log_std = float(known["mean"]), float(known["log_std"])

        def model(x, t, mean=mean, log_std=log_std):
            return torch.cat([torch.full_like(x, mean), torch.full_like(x, 2 * log_std)], 1)

        x0 = torch.full((1, 1, 2, 2), known["pixel"] / 127.5 - 1, dtype=torch.float64)
        x0 = x0 if dtype == torch.float64 else torch.full_like(x0, known["pixel"]).to(torch.uint8)
        found = bits_per_dim(
            model, x0, schedule, prediction="sample", variance="learned", clip=None
        )
        nats = found.vlb[0, 0].item() * math.log(2)
        precision = 1e-10 if dtype == torch.float64 else 2e-5
        assert nats == pytest.approx(float(known["nats"]), rel=precision)
        away = schedule.posterior_mean_coef1[1].item() * (known["pixel"] / 127.5 - 1 - mean)
        log_ratio = schedule.posterior_variance[1].log().item() - 2 * log_std
        kl = 0.5 * (math.exp(log_ratio) - 1 - log_ratio + away**2 * math.exp(-2 * log_std))
        assert found.vlb[0, 1].item() * math.log(2) == pytest.approx(kl, rel=1e-4)


# The bound of Gaussian data ----------------------------------------------------------------------

STD = 0.7


def optimal(schedule, variance):
    """E[ε | x_t] for x_0 ~ N(0, STD²), and with "learned" the variance of x_{t−1} given x_t."""

    def model(x, t):
        shape = (-1, *[1] * (x.ndim - 1))
        bar, rest, exact = (
            values[t].to(x.dtype).reshape(shape)
            for values in (
                schedule.alphas_cumprod,
                schedule.one_minus_alphas_cumprod,
                reverse_variance(schedule).log(),
            )
        )
        eps = rest.sqrt() * x / (bar * STD**2 + rest)
        return torch.cat([eps, exact.expand_as(x)], 1) if variance == "learned" else eps

    return model


def reverse_variance(schedule):
    rest = schedule.one_minus_alphas_cumprod
    x0_variance = STD**2 * rest / (schedule.alphas_cumprod * STD**2 + rest)
    return schedule.posterior_variance + schedule.posterior_mean_coef1**2 * x0_variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_gaussian_data_reaches_the_closed_form(variance, dtype):
    """Each KL is ½ (ln σ²/β̃ + (β̃ + (coef1 (x_0 − E[x_0 | x_t]))²)/σ² − 1), and x_0 − E[x_0 | x_t]
    is Gaussian of known variance: the columns' means over samples lie within five standard errors,
    which a fresh seed would break once in 10⁵ runs of these 6 × 30 means."""
    schedule = NoiseSchedule.linear(31, 1e-3, 0.3)
    n, dims = 200, 48
    x0 = (STD * randn((n, 3, 4, 4), seed=11)).to(dtype)
    found = bits_per_dim(
        optimal(schedule, variance), x0, schedule, variance=variance, clip=None, seed=2
    )
    small = schedule.posterior_variance
    sigma2 = {"fixed_small": small, "fixed_large": schedule.betas}.get(
        variance, reverse_variance(schedule)
    )
    # E of the squared part, in units of σ²; its square is χ², so that its spread over dims · n is
    # √2 of it.
    moved = reverse_variance(schedule) - small
    expected = 0.5 * ((sigma2 / small).log() + (small + moved) / sigma2 - 1) / math.log(2)
    spread = math.sqrt(2 / (n * dims)) * 0.5 * moved / sigma2 / math.log(2)
    off = (found.vlb.double().mean(0) - expected)[1:].abs()
    assert (off < 5 * spread[1:] + 1e-6 * expected[1:]).all()
    # And sample by sample, given its ε.
    for t in (1, 15, 30):
        eps = randn(x0.shape, seed=2, stream=4, index=t).double()
        bar = schedule.alphas_cumprod[t]
        x_t = bar.sqrt() * x0.double() + (1 - bar).sqrt() * eps
        x0_hat = STD**2 * bar.sqrt() * x_t / (STD**2 * bar + 1 - bar)
        squared = ((x0.double() - x0_hat) ** 2).flatten(1).mean(1)
        away = schedule.posterior_mean_coef1[t] ** 2 * squared
        exact = 0.5 * ((sigma2 / small).log()[t] + (small[t] + away) / sigma2[t] - 1) / math.log(2)
        torch.testing.assert_close(found.vlb[:, t].double(), exact, rtol=1e-4, atol=1e-7)
    total = schedule.alphas_cumprod[-1] * x0.double() ** 2 - schedule.alphas_cumprod[-1]
    rest = schedule.one_minus_alphas_cumprod[-1]
    prior = 0.5 * (total.flatten(1).mean(1) - rest.log()) / math.log(2)
    torch.testing.assert_close(found.prior.double(), prior, rtol=1e-5, atol=1e-7)


def test_the_best_variance_has_the_least_bound():
    schedule = NoiseSchedule.linear(31, 1e-3, 0.3)
    x0 = STD * randn((200, 3, 4, 4), seed=11)
    sums = {
        variance: bits_per_dim(
            optimal(schedule, variance), x0, schedule, variance=variance, clip=None
        ).vlb[:, 1:].double().sum(1).mean().item()
        for variance in ("fixed_small", "fixed_large", "learned")
    }  # fmt: skip
    assert sums["learned"] < min(sums["fixed_small"], sums["fixed_large"]) - 1e-3


# Batches, ids, arguments --------------------------------------------------------------------------


def assert_same(found, expected):
    """To the last bit; torch's own sums in float64 depend on the batch."""
    close = (
        {"rtol": 1e-12, "atol": 1e-14}
        if found.vlb.dtype == torch.float64
        else {"rtol": 0, "atol": 0}
    )
    for name in ("total", "prior", "vlb", "mse", "standard_error"):
        parts = (getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(*parts, **close, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("num_timesteps", [None, 9])
def test_the_split_into_batches_does_not_matter(num_timesteps, dtype):
    x0 = images((7, 2, 4, 3)) if dtype == torch.uint8 else unit(torch.float64, (7, 2, 4, 3))
    choices = {"num_timesteps": num_timesteps, "seed": 5}

    def model(x, t):  # no function that vectors and their remainders round differently
        return 0.5 * x

    expected = bits_per_dim(model, x0, SCHEDULE, **choices)
    for size in (1, 3, 100):
        assert_same(bits_per_dim(model, x0, SCHEDULE, batch_size=size, **choices), expected)
    assert_same(bits_per_dim(model, iter(x0.split([2, 4, 1])), SCHEDULE, **choices), expected)
    ids = [6, 0, 3, 2**40, 1, 2, 9]
    with_ids = bits_per_dim(model, x0, SCHEDULE, sample_ids=ids, **choices)
    assert not torch.equal(with_ids.total, expected.total)
    every_second = bits_per_dim(model, x0, SCHEDULE, sample_ids=range(1, 14, 2), **choices)
    listed = bits_per_dim(model, x0, SCHEDULE, sample_ids=[1, 3, 5, 7, 9, 11, 13], **choices)
    assert_same(every_second, listed)
    for given in (ids, torch.tensor(ids)):
        found = bits_per_dim(model, x0.split(3), SCHEDULE, sample_ids=given, **choices)
        assert_same(found, with_ids)
    alone = bits_per_dim(model, x0[2:3], SCHEDULE, sample_ids=[3], **choices)
    torch.testing.assert_close(alone.total, with_ids.total[2:3], rtol=1e-12, atol=0)


def test_labels_and_other_arguments_go_to_the_model():
    x0, labels = images(), torch.arange(5)
    seen = []

    def model(x, t, class_labels=None, gain=1.0, table=None):
        seen.append((len(x), class_labels, gain, table))
        return gain * x

    fixed = torch.zeros(3)
    kwargs = {"class_labels": labels, "gain": 0.5, "table": fixed}
    schedule = NoiseSchedule.linear(2)
    bits_per_dim(model, x0, schedule, batch_size=2, model_kwargs=kwargs)
    assert [(n, given.tolist()) for n, given, _, _ in seen[::2]] == [
        (2, [0, 1]),
        (2, [2, 3]),
        (1, [4]),
    ]
    assert all(gain == 0.5 and torch.equal(table, fixed) for _, _, gain, table in seen)
    seen.clear()
    batches = [(x0[:2], labels[:2]), (x0[2:], None)]
    bits_per_dim(model, batches, schedule, model_kwargs={"gain": 0.5})
    assert [None if c is None else c.tolist() for _, c, _, _ in seen[::2]] == [[0, 1], None]
    assert all(gain == 0.5 for _, _, gain, _ in seen)


def test_a_module_gets_its_dtype_and_runs_without_gradients():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x, t):
            assert x.dtype == torch.bfloat16
            assert t.dtype == torch.int64
            assert not torch.is_grad_enabled()
            return types.SimpleNamespace(sample=self.gain * x)

    model = Half()
    with pytest.warns(UserWarning, match="the model is in training mode"):
        found = bits_per_dim(model, images(), SCHEDULE)
    model.eval()
    low = bits_per_dim(model, images(), SCHEDULE)
    assert torch.equal(low.total, found.total)
    wide = bits_per_dim(model, unit(torch.float64), SCHEDULE)
    assert wide.total.dtype == torch.float64
    torch.testing.assert_close(low.total.double(), wide.total, rtol=0.02, atol=0)
    found.total.add_(1)  # a tensor like others
    with pytest.raises(TypeError, match=r"parameters are torch.float64; call model.float\(\), or"):
        bits_per_dim(model.double(), images(), SCHEDULE)


def test_no_samples():
    found = bits_per_dim(model_of(), images((0, 2, 4, 3)), SCHEDULE)
    assert found.vlb.shape == (0, 40)
    assert found.total.shape == (0,)


def test_one_timestep():
    found = bits_per_dim(model_of(), images(), NoiseSchedule([0.5]))
    torch.testing.assert_close(found.total, found.prior + found.vlb[:, 0])


def test_progress(monkeypatch, capsys):
    bits_per_dim(model_of(), images(), SCHEDULE, batch_size=2, progress=True)
    assert "120/120" in capsys.readouterr().err
    bits_per_dim(model_of(), iter([images()]), SCHEDULE, num_timesteps=9, progress=True)
    assert "9step" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="a progress bar needs tqdm: pip install tqdm"):
        bits_per_dim(model_of(), images(), SCHEDULE, progress=True)


# Subsets of timesteps ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [4, 10, 40, 1000, 4000])
def test_strata(num_steps):
    for evaluated in {3, 4, 5, 8, 17, 50, 51, num_steps - 1}:
        if not 3 <= evaluated < num_steps:
            continue
        strata = _strata(num_steps, evaluated)
        assert sum(s.drawn for s in strata) == evaluated
        assert all(2 <= s.drawn <= s.size for s in strata[1:])
        assert strata[0] == (0, 1, 1)
        ends = [s.begin + s.size for s in strata]
        assert [s.begin for s in strata] == [0, *ends[:-1]]
        assert ends[-1] == num_steps
        sizes = [s.size for s in strata[1:]]
        assert sizes == sorted(sizes)
    assert _strata(num_steps, num_steps) == _strata(num_steps, None) == [(0, num_steps, num_steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_subset_has_the_values_of_all(dtype):
    """What is evaluated is what evaluating everything gives, and the rest is NaN."""
    x0 = unit(dtype)
    every = bits_per_dim(model_of(), x0, SCHEDULE, seed=4)
    for evaluated in (3, 8, 11, 39):
        some = bits_per_dim(model_of(), x0, SCHEDULE, seed=4, num_timesteps=evaluated)
        held = ~some.vlb.isnan()
        assert held.sum(1).tolist() == [evaluated] * 5
        assert held[:, 0].all()
        assert torch.equal(held, ~some.mse.isnan())
        assert torch.equal(some.vlb[held], every.vlb[held])
        torch.testing.assert_close(some.mse[held], every.mse[held])
        assert torch.equal(some.prior, every.prior)
        assert (some.standard_error > 0).all()
    other = bits_per_dim(model_of(), x0, SCHEDULE, seed=4, sample_ids=range(1, 6), num_timesteps=8)
    assert not torch.equal(other.vlb.isnan(), some.vlb.isnan())
    everything = bits_per_dim(model_of(), x0, SCHEDULE, seed=4, num_timesteps=40)
    assert_same(everything, every)


def test_the_estimate_is_of_each_stratum():
    """total and standard_error by hand from the columns."""
    found = bits_per_dim(model_of(), unit(torch.float64), SCHEDULE, seed=4, num_timesteps=12)
    for n in range(5):
        total, variance = found.prior[n].item(), 0.0
        for begin, size, drawn in _strata(40, 12):
            column = found.vlb[n, begin : begin + size]
            terms = column[~column.isnan()].numpy()
            assert len(terms) == drawn
            total += size * terms.mean()
            if drawn < size:
                variance += size**2 * (1 - drawn / size) * terms.var(ddof=1) / drawn
        assert found.total[n].item() == pytest.approx(total, rel=1e-12)
        assert found.standard_error[n].item() == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("evaluated", [7, 8])
def test_the_estimate_is_unbiased(evaluated):
    """Over 20,000 ids that see the same terms, by 5 standard errors: the total, and its variance
    against what standard_error says of it. A fresh seed would fail once in 10⁶ each."""
    n, schedule = 20_000, NoiseSchedule.linear(40, 1e-4, 0.3)

    def model(x, t):  # x̂₀: wrong by 1/t or so, whatever the noise
        return (1 / (1.0 + t) ** 0.7).reshape(-1, 1).to(x.dtype).expand_as(x)

    x0 = torch.zeros(n, 1)
    choices = {"prediction": "sample", "variance": "fixed_large"}
    every = bits_per_dim(model, x0[:1], schedule, **choices)
    some = bits_per_dim(model, x0, schedule, num_timesteps=evaluated, **choices)
    total = some.total.double()
    assert abs(total.mean() - every.total[0]) < 5 * total.std() / math.sqrt(n)
    squares = some.standard_error.double() ** 2
    kurtosis = ((total - total.mean()) ** 4).mean() / total.var() ** 2
    spread = squares.var() / n + total.var() ** 2 * (kurtosis - 1) / n
    assert abs(squares.mean() - total.var()) < 5 * spread.sqrt()
    taken = ~some.vlb.isnan()
    assert (taken.sum(1) == evaluated).all()  # none twice
    times = taken.double().mean(0)
    for begin, size, drawn in _strata(40, evaluated):
        share = drawn / size
        allowed = 5.5 * math.sqrt(share * (1 - share) / n)
        assert ((times[begin : begin + size] - share).abs() <= allowed).all()
    assert some.mean == pytest.approx(total.mean().item())
    assert some.mean_timestep_error == pytest.approx(squares.sum().sqrt().item() / n)
    assert some.mean_sample_error == pytest.approx(total.std().item() / math.sqrt(n))


# What is refused -----------------------------------------------------------------------------


def fails(error, message, model=None, x0=None, schedule=SCHEDULE, **choices):
    calls = []

    def counting(x, t):
        calls.append(t)
        return x

    with pytest.raises(error, match=message):
        bits_per_dim(counting if model is None else model, images() if x0 is None else x0,
                     schedule, **choices)  # fmt: skip
    assert calls == []


def test_bad_arguments():
    fails(TypeError, "model must be callable; got int", model=3)
    fails(TypeError, "schedule must be a NoiseSchedule; got list", schedule=[0.1])
    fails(ValueError, "prediction must be one of", prediction="eps")
    fails(ValueError, "variance must be one of", variance="large")
    fails(ValueError, "cdf must be one of 'exact', 'tanh'; got 'erf'", cdf="erf")
    fails(ValueError, r"clip must be \(lo, hi\)", clip=(1.0, -1.0))
    fails(ValueError, "seed must lie in", seed=-1)
    fails(ValueError, "batch_size must be at least 1; got 0", batch_size=0)
    fails(TypeError, "batch_size must be an integer", batch_size=2.0)
    for number in (0, 2, 41):
        fails(ValueError, "num_timesteps must lie in 3 … 40", num_timesteps=number)
    fails(TypeError, "num_timesteps must be an integer", num_timesteps=3.5)
    zero_snr = SCHEDULE.rescale_zero_terminal_snr()
    for x0 in (images(), unit(torch.float64)):
        fails(ValueError, "where alphas_cumprod is 0", x0=x0, schedule=zero_snr)
    fails(ValueError, r"sample_ids must have shape \[5\]; got \[4\]", sample_ids=range(4))
    fails(ValueError, "sample_ids must lie in 0", sample_ids=[0, 1, 2, 3, -4])
    fails(ValueError, "sample_ids must not be negative", sample_ids=torch.arange(5) - 1)


def test_bad_data():
    fails(TypeError, "x0 must be a tensor or an iterable of batches; got int", x0=3)
    fails(TypeError, "x0 must be tensors; got float", x0=[0.5])
    fails(TypeError, "x0 must be float64, float32, .* uint8; got torch.int64", x0=images().long())
    fails(ValueError, r"x0 must be \[N, C, …\]; got \[3\]", x0=torch.zeros(3))
    fails(ValueError, "x0 gave no batches", x0=[])
    fails(ValueError, "must be images, or .images, labels.; got 3 things", x0=[(images(),) * 3])
    fails(ValueError, "batch_size belongs to a tensor x0", x0=[images()], batch_size=2)


def test_ids_of_another_count():
    with pytest.raises(ValueError, match="sample_ids must be 5, one a sample; got 6"):
        bits_per_dim(model_of(), [images()], SCHEDULE, sample_ids=range(6))


def test_bad_models():
    with pytest.raises(TypeError, match="model must return a tensor, or an object"):
        bits_per_dim(lambda x, t: None, images(), SCHEDULE)
    with pytest.raises(ValueError, match="twice x's channels for a learned variance"):
        bits_per_dim(lambda x, t: x, images(), SCHEDULE, variance="learned")
    with pytest.raises(ValueError, match="must return a float tensor of shape"):
        bits_per_dim(lambda x, t: x[:, :1], unit(torch.float64), SCHEDULE)
