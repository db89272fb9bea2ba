"""DenoisingLoss: what its draws depend on, what the model gets of them, and what is not stored.

Statistics use fixed seeds; each bound states how often a fresh seed would break it."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    IDS,
    SAMPLINGS,
    SCHEDULE,
    SHAPE,
    Model,
    T,
    elementwise,
    images,
    noise,
    zero,
)
from torch.profiler import ProfilerActivity, profile

from ddpm_fast import DenoisingLoss, NoiseSchedule, add_noise, reference
from ddpm_fast.backends import select

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
