"""DenoisingLoss: its values and gradients against the reference, and what its draws depend on.

Statistics use fixed seeds; each bound states how often a fresh seed would break it."""

from __future__ import annotations

import itertools
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from ddpm_fast import DenoisingLoss, NoiseSchedule, add_noise, randn, reference
from ddpm_fast.backends import select

SCHEDULE = NoiseSchedule.cosine(1000)
SHAPE = (6, 3, 5, 4)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
IDS = torch.tensor([0, 3, 2**40, 17, 5, 1])
T = torch.tensor([0, 1, 250, 500, 998, 700])


def images(shape=SHAPE, dtype=torch.float32):
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    pixels = levels.to(torch.uint8)
    return pixels if dtype == torch.uint8 else reference.unit_from_pixel(pixels).to(dtype)


class Model(torch.nn.Module):
    """A little of everything that a gradient can go through."""

    def __init__(self, channels=3, out_channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, 8, 3, padding=1)
        self.out = torch.nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x, t):
        scale = 1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
        return self.out(torch.tanh(scale * self.conv(x)))


def zero(x, t, **kwargs):
    return torch.zeros_like(x)


def noise(ids=IDS, seed=7, shape=SHAPE):
    return randn(shape, seed=seed, sample_ids=ids, stream=2)


# Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_mean_square_against_the_noise_of_the_address(prediction, dtype):
    x0, model = images(dtype=dtype), Model()
    output = DenoisingLoss(SCHEDULE, prediction=prediction)(model, x0, seed=7, sample_ids=IDS, t=T)
    eps = noise()
    x_t = add_noise(x0, T, SCHEDULE, seed=7, sample_ids=IDS)
    target = reference.denoising_target(images(), eps, T, SCHEDULE, prediction)
    expected = ((target - model(x_t, T)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(output.per_sample, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(output.t, T)


def objective(model, x0, t, eps, dtype, choices):
    """The mean over the batch by the reference's formulas and torch's autograd, in ``dtype``."""
    x0, eps = x0.to(dtype), eps.to(dtype)
    prediction = choices.get("prediction", "epsilon")
    variance = choices.get("variance", "fixed_small")
    kind = choices.get("objective", "simple")
    x_t = reference.q_sample(x0, t, SCHEDULE, eps)
    output = model.to(dtype)(x_t, t)
    m = output[:, : x0.shape[1]]
    target = reference.denoising_target(x0, eps, t, SCHEDULE, prediction)
    simple = reference.regression(target, m)
    if kind == "simple":
        return simple.mean()
    if kind == "hybrid":
        output = torch.cat([m.detach(), output[:, x0.shape[1] :]], 1)
    bound = len(SCHEDULE) * reference.vlb_terms(
        x0, x_t, output, t, SCHEDULE, prediction=prediction, variance=variance
    )
    return bound.mean() if kind == "vlb" else (simple + choices["vlb_weight"] * bound).mean()


CHOICES = [
    *({"prediction": p, "variance": v} for p in PREDICTIONS for v in ("fixed_small", "learned")),
    *({"objective": "vlb", "prediction": p, "variance": "fixed_large"} for p in PREDICTIONS),
    {"objective": "vlb", "variance": "learned_range"},
    {"objective": "vlb", "variance": "learned", "prediction": "sample"},
    *(
        {"objective": "hybrid", "variance": v, "prediction": p, "vlb_weight": 0.01}
        for v in ("learned", "learned_range")
        for p in PREDICTIONS
    ),
]


@pytest.mark.parametrize("samples", [4, 6])  # a power of two, and none
@pytest.mark.parametrize("choices", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_gradients_in_the_models_parameters(choices, samples):
    x0, t, ids = images()[:samples], T[:samples], IDS[:samples]
    learned = choices.get("variance", "").startswith("learned")
    model = Model(out_channels=6 if learned else 3)
    if choices.get("variance") == "learned":  # log σ² that a model may have come to
        model.out.bias.data[3:] = -6.0
    result = DenoisingLoss(SCHEDULE, **choices)(model, x0, seed=7, sample_ids=ids, t=t)
    found = torch.autograd.grad(result.loss, list(model.parameters()))
    eps = noise(ids, shape=x0.shape)
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        loss = objective(model, x0, t, eps, dtype, choices)
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    model.float()
    assert result.loss.item() == pytest.approx(values[1].item(), rel=1e-6)
    for ours, eager, exact in zip(found, *gradients, strict=True):
        # The last layers add up few numbers: eager's error may be next to nothing there.
        allowed = 2 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


def test_the_mean_over_samples_is_what_is_differentiated():
    """per_sample can be reduced by hand, too."""
    model, x0 = Model(), images()
    loss = DenoisingLoss(SCHEDULE)
    result = loss(model, x0, seed=7, sample_ids=IDS, t=T)
    (by_loss,) = torch.autograd.grad(result.loss, model.conv.weight, retain_graph=True)
    result = loss(model, x0, seed=7, sample_ids=IDS, t=T)
    (by_hand,) = torch.autograd.grad(result.per_sample.mean(), model.conv.weight)
    torch.testing.assert_close(by_loss, by_hand)


def test_hybrid_keeps_the_mean_out_of_the_bound():
    kept = {}

    def model(x, t):
        m, v = (torch.full_like(x, value).requires_grad_() for value in (0.3, -0.5))
        kept["m"], kept["v"] = m, v
        return torch.cat([m, v], 1)

    def gradients(**choices):
        loss = DenoisingLoss(SCHEDULE, variance="learned_range", **choices)
        loss(model, images(), seed=7, sample_ids=IDS, t=T).loss.backward()
        return kept["m"].grad, kept["v"].grad

    simple, nothing = gradients()
    of_mean, of_bound = gradients(objective="vlb")
    m, v = gradients(objective="hybrid", vlb_weight=0.25)
    assert nothing.abs().max() == 0
    assert of_mean.abs().max() > 0
    torch.testing.assert_close(m, simple)
    torch.testing.assert_close(v, 0.25 * of_bound)


def test_vlb_estimates_the_sum_of_the_terms():
    """The mean over all timesteps of T · L_t."""
    schedule = NoiseSchedule.linear(12)
    x0 = images()[:1].expand(12, -1, -1, -1).contiguous()
    t, ids = torch.arange(12), torch.arange(12)
    result = DenoisingLoss(schedule, objective="vlb")(zero, x0, seed=1, sample_ids=ids, t=t)
    eps = noise(ids, seed=1, shape=x0.shape).double()
    x_t = reference.q_sample(x0.double(), t, schedule, eps)
    terms = reference.vlb_terms(x0.double(), x_t, 0 * x_t, t, schedule)
    assert result.loss.item() == pytest.approx(terms.sum().item(), rel=1e-5)


# Weights -------------------------------------------------------------------------------------


WEIGHTINGS = [
    ({"weighting": "min_snr"}, lambda snr: min(snr, 5.0) / snr),
    ({"weighting": "min_snr", "min_snr_gamma": 1.5}, lambda snr: min(snr, 1.5) / snr),
    ({"weighting": "p2"}, lambda snr: 1 / (1 + snr)),
    ({"weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0}, lambda snr: (2 + snr) ** -0.5),
]


@pytest.mark.parametrize(("choices", "of_eps"), WEIGHTINGS)
def test_weights_whatever_the_model_predicts(choices, of_eps):
    """A regression on ε with the paper's weight; the same model that predicts x_0 or v weighs the
    same, since its error is 1/√snr, or √((snr+1)/snr), of ε's."""
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule = NoiseSchedule.linear(1000)
    x0, eps = images(), noise()
    x_t = reference.q_sample(x0.double(), T, schedule, eps.double())
    wrong = eps.double() + 0.1 * randn(SHAPE, seed=3).double()
    wrong_x0 = reference.x0_from_eps(x_t, wrong, T, schedule)
    plain = reference.regression(eps.double(), wrong)
    snr = (alphas_cumprod / (1 - alphas_cumprod))[T]
    expected = plain * torch.tensor([of_eps(s) for s in snr])
    for prediction in PREDICTIONS:
        output = reference.denoising_target(wrong_x0, wrong, T, schedule, prediction).float()
        loss = DenoisingLoss(schedule, prediction=prediction, **choices)
        result = loss(lambda x, t, m=output: m, x0, seed=7, sample_ids=IDS, t=T)
        # The error of x̂₀ is a small difference where the noise is small.
        torch.testing.assert_close(result.per_sample.double(), expected, rtol=3e-4, atol=0)
        torch.testing.assert_close(result.loss.double(), expected.mean(), rtol=3e-4, atol=0)


def test_weights_at_a_terminal_snr_of_0():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    assert reference.min_snr_weights(schedule, "epsilon", 5.0)[-1] == 1
    assert reference.min_snr_weights(schedule, "v_prediction", 5.0)[-1] == 0
    assert reference.p2_weights(schedule, "epsilon", 2.0, 1.0)[-1] == 1
    with pytest.raises(ValueError, match="weight of timestep 999 is not finite: take p2_k above 0"):
        DenoisingLoss(schedule, weighting="p2", p2_k=0.0)


def test_hybrid_weighs_the_simple_part_alone():
    choices = {"objective": "hybrid", "variance": "learned_range"}
    plain, weighted = (
        DenoisingLoss(SCHEDULE, **choices, weighting=w)(
            lambda x, t: torch.zeros(6, 6, 5, 4), images(), seed=7, sample_ids=IDS, t=T
        ).per_sample
        for w in (None, "p2")
    )
    bound, simple = (
        DenoisingLoss(SCHEDULE, objective=o, variance="learned_range")(
            lambda x, t: torch.zeros(6, 6, 5, 4), images(), seed=7, sample_ids=IDS, t=T
        ).per_sample
        for o in ("vlb", "simple")
    )
    weights = reference.p2_weights(SCHEDULE, "epsilon", 1.0, 1.0)[T].float()
    torch.testing.assert_close(plain, simple + 0.001 * bound)
    torch.testing.assert_close(weighted, weights * simple + 0.001 * bound)


# A run is a function of its seed ---------------------------------------------------------------


def train(seed, steps, loss, batch=4, model=None):
    model = model or Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        rows = [(step * batch + i) % 6 for i in range(batch)]
        result = loss(model, images()[rows], seed=seed)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    return model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


SAMPLINGS = ["uniform", "antithetic", "loss_second_moment"]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_run_is_a_function_of_its_seed_and_goes_on_where_it_was(sampling):
    schedule = NoiseSchedule.linear(3)  # few enough for the histories to fill

    def new():
        return DenoisingLoss(schedule, timestep_sampling=sampling)

    loss = new()
    at_a_stretch = train(5, 20, loss)
    assert loss.samples_seen == 80
    assert same(at_a_stretch, train(5, 20, new()))
    assert not same(at_a_stretch, train(6, 20, new()))
    first = new()
    half = train(5, 12, first)
    second = new()
    second.load_state_dict(first.state_dict())
    assert second.samples_seen == 48
    assert same(at_a_stretch, train(5, 8, second, model=half))
    end = loss.state_dict()
    for key, value in second.state_dict().items():
        assert torch.equal(value, end[key])
    kept = {key: value.clone() for key, value in end.items()}
    train(5, 3, loss)  # what was given out stays as it was
    assert all(torch.equal(end[key], value) for key, value in kept.items())


def test_ids_that_are_given_leave_the_count_alone():
    loss = DenoisingLoss(SCHEDULE)
    expected = loss(zero, images(), seed=1)
    again = loss(zero, images(), seed=1, sample_ids=range(6))
    assert loss.samples_seen == 6
    assert torch.equal(again.per_sample, expected.per_sample)
    assert torch.equal(again.t, expected.t)
    other = loss(zero, images(), seed=1)  # ids 6 … 11
    assert not torch.equal(other.per_sample, expected.per_sample)


@pytest.mark.parametrize("choices", [{}, {"objective": "vlb"}, {"weighting": "p2"}])
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 12)))
def test_a_samples_loss_is_the_same_bits_in_any_batch(choices, cuts):
    x0 = images((13, 3, 5, 4))
    loss = DenoisingLoss(SCHEDULE, group_size=13, timestep_sampling="antithetic", **choices)
    whole = loss(elementwise, x0, seed=2, sample_ids=range(13))
    bounds = [0, *sorted(cuts), 13]
    parts = [
        loss(elementwise, x0[a:b], seed=2, sample_ids=range(a, b))
        for a, b in itertools.pairwise(bounds)
    ]
    assert torch.equal(torch.cat([p.per_sample for p in parts]), whole.per_sample)
    assert torch.equal(torch.cat([p.t for p in parts]), whole.t)
    mean = sum(p.loss.item() * len(p.t) for p in parts) / 13
    assert mean == pytest.approx(whole.loss.item(), rel=1e-6)


def elementwise(x, t):
    return 0.5 * x


def test_order_and_layout_do_not_matter():
    loss = DenoisingLoss(SCHEDULE, prediction="v_prediction")
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    expected = loss(elementwise, images(), seed=2, sample_ids=IDS).per_sample
    permuted = loss(elementwise, images()[order], seed=2, sample_ids=IDS[order]).per_sample
    assert torch.equal(permuted, expected[order])
    last = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        loss(elementwise, last, seed=2, sample_ids=IDS).per_sample, expected, rtol=1e-6, atol=0
    )


def test_a_seed_for_each_sample():
    loss = DenoisingLoss(SCHEDULE, label_dropout=0.5, null_label=0)
    seeds = torch.tensor([3, 4, -1, 3, 3, 9])  # -1 is 2^64 - 1
    labels = torch.arange(1, 7)
    seen = []

    def model(x, t, class_labels):
        seen.append(class_labels)
        return 0.5 * x

    together = loss(
        model, images(), seed=seeds, sample_ids=IDS, model_kwargs={"class_labels": labels}
    )
    for i, seed in enumerate([3, 4, 2**64 - 1, 3, 3, 9]):
        one = loss(
            model,
            images()[i : i + 1],
            seed=seed,
            sample_ids=IDS[i : i + 1].tolist(),
            model_kwargs={"class_labels": labels[i : i + 1]},
        )
        assert torch.equal(one.per_sample, together.per_sample[i : i + 1])
        assert torch.equal(one.t, together.t[i : i + 1])
        assert torch.equal(seen[-1], seen[0][i : i + 1])


# What the model gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_the_model_gets(dtype):
    seen = []

    def model(x, t, extra):
        seen.append((x, t, extra))
        return types.SimpleNamespace(sample=0.5 * x)

    loss = DenoisingLoss(SCHEDULE, dtype=dtype)
    result = loss(model, images(), seed=7, sample_ids=IDS, model_kwargs={"extra": "kept"})
    x, t, extra = seen[0]
    assert torch.equal(x, add_noise(images(), t, SCHEDULE, seed=7, sample_ids=IDS, dtype=dtype))
    seeds = torch.full_like(IDS, 7)
    assert torch.equal(t, reference.random_timesteps(1000, seeds, IDS))
    assert torch.equal(result.t, t)
    assert extra == "kept"
    assert result.per_sample.dtype == result.loss.dtype == torch.float32
    expected = reference.regression(noise(), 0.5 * x.float())
    torch.testing.assert_close(result.per_sample, expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(loss(lambda x, t: x, images(), seed=7, sample_ids=IDS, t=3).t, 0 * T + 3)


def test_autocast():
    model = Model()
    loss = DenoisingLoss(SCHEDULE)
    expected = loss(model, images(), seed=7, sample_ids=IDS)
    expected.loss.backward()
    exact = model.conv.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(model, images(), seed=7, sample_ids=IDS)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-2, atol=0)
    largest = exact.abs().max().item()
    torch.testing.assert_close(model.conv.weight.grad, exact, rtol=0, atol=0.05 * largest)


def test_without_gradients():
    with torch.no_grad():
        result = DenoisingLoss(SCHEDULE)(Model(), images(), seed=0)
    assert not result.loss.requires_grad
    with torch.inference_mode():
        loss = DenoisingLoss(SCHEDULE, weighting="min_snr")
        inside = loss(zero, images(), seed=0)
    model = Model()  # what was made in there serves outside
    loss.samples_seen = 0
    outside = loss(model, images(), seed=0)
    outside.loss.backward()
    assert torch.equal(inside.t, outside.t)
    assert model.conv.weight.grad.abs().max() > 0


EVERY_KIND = [
    *({"timestep_sampling": sampling} for sampling in SAMPLINGS),
    {"weighting": "p2", "prediction": "sample"},
    {"objective": "vlb"},
    {"objective": "hybrid", "variance": "learned_range"},
    {"offset_noise": 0.1, "prediction": "v_prediction"},
    {"label_dropout": 0.1, "null_label": 3},
]


@pytest.mark.parametrize("choices", EVERY_KIND, ids=str)
def test_no_value_is_read_back(choices):
    """On a device whose values cannot be read, as nobody should wait for a GPU's."""
    w = torch.ones((), device="meta", requires_grad=True)
    labels = torch.zeros(6, dtype=torch.int64, device="meta")

    def model(x, t, class_labels):
        return torch.cat([w * x] * (1 + ("variance" in choices)), 1)

    loss = DenoisingLoss(SCHEDULE, **choices)
    x0 = torch.zeros(SHAPE, device="meta")
    arguments = {"seed": 0, "model_kwargs": {"class_labels": labels}}
    with torch.inference_mode():
        loss(model, x0, **arguments)
    for ids in (None, None, IDS.to("meta")):
        result = loss(model, x0, sample_ids=ids, **arguments)
        result.loss.backward()
        assert result.t.device == result.per_sample.device == w.grad.device == x0.device
    loss(model, x0, t=T.to("meta"), **arguments)


def test_a_model_may_change_what_it_gets():
    def model(x, t):
        t.mul_(0)
        return x.mul_(0.5)

    loss = DenoisingLoss(SCHEDULE, prediction="v_prediction", weighting="min_snr")
    expected = loss(elementwise, images(), seed=1, sample_ids=range(6))
    for t in (expected.t.clone(), None):
        found = loss(model, images(), seed=1, sample_ids=range(6), t=t)
        assert torch.equal(found.per_sample, expected.per_sample)
        assert torch.equal(found.t, expected.t)
        assert t is None or torch.equal(t, expected.t)
    again = loss(elementwise, images(), seed=1, sample_ids=range(6))
    assert torch.equal(again.per_sample, expected.per_sample)


# Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [{}, {"prediction": "v_prediction"}, {"objective": "vlb"}, {"weighting": "min_snr"}],
)
def test_no_noise_is_stored(choices):
    """Of the images' size or more there are x_t, what the model says, the gradient that is made
    with the loss, and what the model's backward makes of it: of float32 images, and of pixels."""
    if select(torch.device("cpu")) == "reference":
        pytest.skip("plain PyTorch stores what the kernels draw")
    w = torch.tensor(0.5, requires_grad=True)
    loss = DenoisingLoss(SCHEDULE, **choices)
    shape = (16, 3, 16, 16)
    for x0 in (images(shape), images(shape, torch.uint8)):
        loss(lambda x, t: w * x, x0, seed=0).loss.backward()  # tables are made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss(lambda x, t: w * x, x0, seed=0).loss.backward()
        events = seen.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        assert [size for size in sizes if size >= x0.numel()] == [4 * x0.numel()] * 4


# Offset noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_offset_noise(prediction, variance):
    """ε' = ε + s o: x_t has it, and the target too."""
    s, seen = 0.3, []
    o = randn((6, 3), seed=7, sample_ids=IDS, stream=5)[:, :, None, None].double()
    eps = noise().double() + s * o
    x0 = images().double()
    target = reference.denoising_target(x0, eps, T, SCHEDULE, prediction).float()
    half = torch.zeros(SHAPE if variance == "learned" else (6, 0, 5, 4))

    def model(x, t, error):
        seen.append(x)
        return torch.cat([target + error, half], 1)

    loss = DenoisingLoss(SCHEDULE, prediction=prediction, offset_noise=s, variance=variance)
    for error in (0.0, 0.5):
        result = loss(model, images(), seed=7, sample_ids=IDS, t=T, model_kwargs={"error": error})
        torch.testing.assert_close(
            result.per_sample, torch.full((6,), error**2), rtol=1e-5, atol=1e-10
        )
    x_t = reference.q_sample(x0, T, SCHEDULE, eps).float()
    torch.testing.assert_close(seen[0], x_t, rtol=1e-5, atol=1e-6)


def test_offset_noise_keeps_the_dtype_and_the_layout():
    seen = []

    def model(x, t):
        seen.append(x)
        return x

    loss = DenoisingLoss(SCHEDULE, offset_noise=0.1, dtype=torch.bfloat16)
    loss(model, images().to(memory_format=torch.channels_last), seed=1)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    DenoisingLoss(SCHEDULE, offset_noise=0.1)(model, images(dtype=torch.uint8), seed=1)
    assert seen[1].dtype == torch.float32


# Label dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_label_dropout(share):
    n, seen = 4096, []

    def model(x, t, y):
        seen.append(y)
        return x

    labels = torch.arange(n) % 10
    loss = DenoisingLoss(SCHEDULE, label_dropout=share, null_label=10, label_key="y")
    kwargs = {"y": labels}
    loss(model, torch.zeros(n, 1), seed=3, model_kwargs=kwargs)
    words = reference.first_words(7, torch.full((n,), 3), torch.arange(n)).numpy()
    dropped = words < share * 2**32
    assert seen[0].tolist() == [
        10 if d else label for d, label in zip(dropped, labels, strict=True)
    ]
    assert kwargs["y"] is labels
    assert torch.equal(labels, torch.arange(n) % 10)
    # Six standard deviations: one fresh seed in 5e8.
    assert abs(dropped.mean() - share) <= 6 * math.sqrt(share * (1 - share) / n)


# What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prediction": "noise"}, "prediction must be one of 'epsilon', 'sample', 'v_prediction'"),
        ({"variance": "none"}, "variance must be one of"),
        ({"objective": "l2"}, "objective must be one of 'simple', 'vlb', 'hybrid'; got 'l2'"),
        ({"weighting": "snr"}, "weighting must be one of 'min_snr', 'p2'; got 'snr'"),
        ({"timestep_sampling": "even"}, "timestep_sampling must be one of 'uniform', 'antithetic'"),
        ({"weighting": "min_snr", "min_snr_gamma": 0}, "min_snr_gamma must be finite and above 0"),
        ({"weighting": "p2", "p2_gamma": -1.0}, "p2_gamma must be finite and above 0; got -1"),
        ({"weighting": "p2", "p2_k": -1.0}, "p2_k must be finite and at least 0; got -1"),
        ({"weighting": "p2", "objective": "vlb"}, "the bound's own weights; got weighting='p2'"),
        ({"objective": "hybrid"}, "trains a variance 'learned' or 'learned_range'; got variance="),
        ({"vlb_weight": math.nan}, "vlb_weight must be finite"),
        ({"offset_noise": -0.1}, "offset_noise must be finite and at least 0; got -0.1"),
        ({"offset_noise": 0.1, "objective": "vlb"}, "offset_noise belongs to objective='simple'"),
        (
            {"offset_noise": 0.1, "objective": "hybrid", "variance": "learned"},
            "offset_noise belongs to objective='simple'",
        ),
        ({"label_dropout": 0.1}, "label_dropout needs null_label"),
        ({"label_dropout": 1.1, "null_label": 0}, "label_dropout must be .* at most 1; got 1.1"),
        ({"group_size": 0}, "group_size must lie in 1 … 2"),
    ],
)
def test_choices_that_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(SCHEDULE, **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedule": [0.1]}, "schedule must be a NoiseSchedule; got list"),
        ({"min_snr_gamma": "5", "weighting": "min_snr"}, "min_snr_gamma must be a number; got '5'"),
        ({"group_size": 2.5}, "group_size must be an integer; got 2.5"),
        ({"label_dropout": 0.1, "null_label": 1.5}, "null_label must be an integer; got 1.5"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16, float16 or None"),
    ],
)
def test_choices_of_another_type_are_refused(choices, message):
    with pytest.raises(TypeError, match=message):
        DenoisingLoss(**{"schedule": SCHEDULE, **choices})


def test_a_schedule_without_a_bound_is_refused_for_the_bound():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="alphas_cumprod is 0 there"):
        DenoisingLoss(schedule, objective="vlb")
    DenoisingLoss(schedule, objective="vlb", prediction="v_prediction")
    DenoisingLoss(schedule)


def fails(error, message, model=zero, x0=None, choices=None, **arguments):
    loss = DenoisingLoss(SCHEDULE, **(choices or {}))
    with pytest.raises(error, match=message):
        loss(model, images() if x0 is None else x0, **{"seed": 0, **arguments})
    assert loss.samples_seen == 0  # a batch that failed is not consumed


def test_bad_arguments():
    fails(TypeError, "model must be callable; got int", model=3)
    fails(TypeError, "x0 must be a tensor; got list", x0=[0.0])
    fails(TypeError, "x0 must be float32, bfloat16, float16, uint8; got torch.int64", x0=T[:, None])
    fails(TypeError, "got torch.float64", x0=images().double())
    fails(ValueError, r"x0 must be \[N, C, …\] with N at least 1; got \[6\]", x0=torch.zeros(6))
    fails(ValueError, r"N at least 1; got \[0, 3\]", x0=torch.zeros(0, 3))
    fails(ValueError, "x0 requires grad", x0=images().requires_grad_())
    fails(ValueError, "seed must lie in", seed=-1)
    fails(TypeError, "seed must be an integer", seed=1.5)
    fails(ValueError, r"sample_ids must have shape \[6\]; got \[5\]", sample_ids=range(5))
    fails(ValueError, "sample_ids must lie in", sample_ids=range(-1, 5))
    fails(ValueError, "sample_ids must not be negative; got -1", sample_ids=IDS - 1)
    fails(ValueError, r"t must have shape \[6\]; got \[1\]", t=torch.zeros(1, dtype=torch.int64))
    fails(ValueError, "t must lie in 0 … 999; got 0 … 1000", t=T + torch.tensor([0, 0, 0, 0, 2, 0]))
    fails(ValueError, "t must lie in 0 … 999; got -1", t=-1)
    fails(TypeError, "t must be int64; got torch.float32", t=T.float())


def test_bad_models():
    fails(TypeError, "object whose .sample is one, or a tuple that begins with one; got NoneType",
          model=lambda x, t: None)  # fmt: skip
    fails(ValueError, r"model must return a float tensor of shape \[6, 3, 5, 4\]; got",
          model=lambda x, t: x[:, :2])  # fmt: skip
    fails(ValueError, r"shape \[6, 6, 5, 4\], twice x's channels for a learned variance; got",
          model=zero, choices={"variance": "learned"})  # fmt: skip
    fails(ValueError, "float tensor .* torch.int64", model=lambda x, t: x.long())
    fails(ValueError, "float tensor .* torch.float64", model=lambda x, t: x.double())

    def broken(x, t):
        raise RuntimeError("out of memory, say")

    fails(RuntimeError, "out of memory, say", model=broken)


def test_bad_labels():
    choices = {"label_dropout": 0.1, "null_label": 10}
    named = r"model_kwargs\['class_labels'\]"
    fails(TypeError, f"label_dropout needs {named}, integers .*; got NoneType", choices=choices)
    fails(TypeError, "got torch.float32", choices=choices, model_kwargs={"class_labels": T.float()})
    fails(ValueError, f"{named} must have shape .6., on cpu; got .5.", choices=choices,
          model_kwargs={"class_labels": T[:5]})  # fmt: skip


def test_bad_state():
    loss = DenoisingLoss(NoiseSchedule.linear(5), timestep_sampling="loss_second_moment")
    state = loss.state_dict()

    def fails(message, new):
        with pytest.raises(ValueError, match=message):
            loss.load_state_dict(new)

    without = {k: v for k, v in state.items() if k != "loss_counts"}
    fails("must have samples_seen, loss_history, loss_counts, .* got samples_seen, loss", without)
    fails("got nothing", {})
    other = DenoisingLoss(NoiseSchedule.linear(6), timestep_sampling="loss_second_moment")
    fails(r"loss_history must have shape \[5, 10\], for a schedule of 5 steps; got \[6, 10\]",
          other.state_dict())  # fmt: skip
    fails("samples_seen must not be negative; got -1", {**state, "samples_seen": torch.tensor(-1)})
    fails(r"samples_seen must have shape \[\].*; got int", {**state, "samples_seen": 3})
    with pytest.raises(ValueError, match="must have samples_seen, as timestep_sampling='uniform'"):
        DenoisingLoss(NoiseSchedule.linear(5)).load_state_dict(state)
