"""Training timesteps: what they are functions of, and how they are distributed.

Statistics use fixed seeds; each bound states how often a fresh seed would break it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm_fast import DenoisingLoss, NoiseSchedule, reference
from ddpm_fast.timesteps import ConsecutiveIds, LossSecondMoment

SEED = 2**64 - 3  # -3 in two's complement


def ids_and_seeds(n, first=0, seed=-3):
    return torch.full((n,), seed), torch.arange(first, first + n)


def zero(x, t):
    return torch.zeros_like(x)


def drawn(n, num_steps=1000, first=0, sample_ids=None, **choices):
    """The timesteps that a call takes."""
    loss = DenoisingLoss(NoiseSchedule.linear(num_steps), **choices)
    sample_ids = range(first, first + n) if sample_ids is None else sample_ids
    return loss(zero, torch.zeros(n, 1), seed=SEED, sample_ids=sample_ids).t


def uniformity(t, num_steps):
    """p-value of a chi-square test against the uniform distribution."""
    return stats.chisquare(np.bincount(t.numpy(), minlength=num_steps)).pvalue


def test_uniform_timesteps_are_the_noise_contracts():
    """t = (w₀ T) >> 32 of stream 3. A fresh seed would fail once in 10⁶."""
    seeds, ids = ids_and_seeds(20_000, first=5)
    words = reference.noise_words(0 * ids, 0 * ids + (3 << 24), seeds, ids)[0]
    t = drawn(20_000, num_steps=50, first=5)
    assert t.tolist() == [(w * 50) >> 32 for w in words.tolist()]
    assert uniformity(t, 50) > 1e-6


@pytest.mark.parametrize("sampling", ["uniform", "antithetic", "loss_second_moment"])
def test_ids_in_whatever_form(sampling):
    choices = {"timestep_sampling": sampling, "group_size": 8}
    expected = drawn(10, first=3, **choices)
    ids = torch.arange(3, 13)
    order = torch.tensor([7, 1, 0, 9, 2, 3, 8, 4, 6, 5])
    assert torch.equal(drawn(10, sample_ids=ids, **choices), expected)
    assert torch.equal(drawn(10, sample_ids=ids.tolist(), **choices), expected)
    assert torch.equal(drawn(10, sample_ids=ids[order], **choices), expected[order])
    assert torch.equal(drawn(5, sample_ids=range(3, 13, 2), **choices), expected[::2])
    last = range(2**63 - 4, 2**63)
    assert torch.equal(drawn(4, sample_ids=last, **choices),
                       drawn(4, sample_ids=torch.tensor(list(last)), **choices))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([0, -1, 2**40]),
            st.integers(0, 400),
            st.integers(1, 50),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_looking_ahead_changes_nothing(calls):
    """Whatever was asked before, an answer is the function's at those ids."""

    def draw(seeds, ids, group):
        return 1000 * ids + seeds % 7 + group, None

    ahead = ConsecutiveIds(draw)
    for seed, first, count, group in calls:
        ids, values, nothing = ahead(seed, first, count, group, torch.device("cpu"))
        assert ids.tolist() == list(range(first, first + count))
        assert values.tolist() == [1000 * i + seed % 7 + group for i in ids.tolist()]
        assert nothing is None


def test_looking_ahead_is_seldom_done():
    asked = []

    def draw(seeds, ids, group):
        asked.append(len(ids))
        return ids, ids

    ahead = ConsecutiveIds(draw)
    for step in range(130):
        ahead(0, 128 * step, 128, 1, torch.device("cpu"))
    assert asked == [128, 64 * 128, 64 * 128, 64 * 128]
    last = 2**63 - 1
    for first in (last - 40, last - 20, last - 1):  # and not beyond the last id
        ids, _, _ = ahead(0, first, 2, 1, torch.device("cpu"))
        assert ids.tolist() == [first, first + 1]
    asked.clear()
    for _ in range(3):  # there and back, as an evaluation in between does
        for seed in (1, 2):
            ahead(seed, 0, 16, 1, torch.device("cpu"))
    assert set(asked) == {16}


@settings(max_examples=50, deadline=None)
@given(
    num_steps=st.integers(1, 3000),
    group_size=st.integers(1, 200),
    group=st.integers(0, 1000),
    seed=st.integers(0, 2**63 - 1),
)
def test_antithetic_timesteps_spread_evenly(num_steps, group_size, group, seed):
    """Each group is T (u + i/G mod 1), floored, from one u of its own: between two neighbours on
    the circle lie T/G timesteps, give or take one."""
    seeds, ids = ids_and_seeds(group_size, first=group * group_size, seed=seed)
    t = reference.antithetic_timesteps(num_steps, group_size, seeds, ids)
    word = int(reference.first_words(3, seeds[:1], ids[:1]))
    for i, found in enumerate(t.tolist()):
        u = (word / 2**32 + i / group_size) % 1
        away = (found + 0.5 - u * num_steps) % num_steps  # u is rounded to 2^-32
        assert 0 <= found < num_steps
        assert min(away, num_steps - away) < 0.501
    around = sorted(t.tolist())
    gaps = np.diff([*around, around[0] + num_steps])
    assert (np.abs(gaps - num_steps / group_size) <= 1).all()


def test_antithetic_timesteps_of_parts_are_those_of_the_group():
    whole = drawn(64, timestep_sampling="antithetic", first=128)
    parts = [
        drawn(16, timestep_sampling="antithetic", group_size=64, first=first)
        for first in (128, 144, 160, 176)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_antithetic_timesteps_are_uniform_one_by_one():
    """Over groups, at one place in them. A fresh seed would fail once in 10⁶."""
    seeds, ids = ids_and_seeds(64 * 20_000)
    t = reference.antithetic_timesteps(50, 64, seeds, ids).reshape(-1, 64)
    for place in (0, 63):
        assert uniformity(t[:, place], 50) > 1e-6
    assert uniformity(t.flatten(), 50) > 0.999  # and together nearly exact


# By the losses' second moment ------------------------------------------------------------------


class OneByOne:
    """What improved-diffusion's resampler keeps, by lists: the last ten losses of each timestep."""

    def __init__(self, num_steps):
        self.losses = [[] for _ in range(num_steps)]

    def update(self, t, losses):
        for step, loss in zip(t, losses, strict=True):
            self.losses[step] = [*self.losses[step], loss][-10:]

    def probabilities(self):
        share = 1 / len(self.losses)
        if any(len(held) < 10 for held in self.losses):
            return np.full(len(self.losses), share)
        moments = np.array([math.sqrt(sum(x * x for x in held) / 10) for held in self.losses])
        return moments / moments.sum() * 0.999 + 0.001 * share


@settings(max_examples=40, deadline=None)
@given(
    num_steps=st.integers(1, 4),
    batches=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), max_size=12),
    seed=st.integers(0, 1000),
)
def test_histories_hold_the_last_ten(num_steps, batches, seed):
    """A batch may hold a timestep many times over."""
    rng = np.random.default_rng(seed)
    ours, theirs = LossSecondMoment(num_steps), OneByOne(num_steps)
    for batch in batches:
        t = np.array(batch) % num_steps
        losses = rng.uniform(0.1, 2.0, len(t))
        ours.update(torch.from_numpy(t), torch.from_numpy(losses), None)
        theirs.update(t.tolist(), losses.tolist())
        np.testing.assert_allclose(ours.probabilities(), theirs.probabilities(), rtol=1e-12)
    seen = np.bincount(np.concatenate([*batches, []]).astype(int) % num_steps, minlength=num_steps)
    assert ours.counts[:-1].tolist() == seen.tolist()


def filled(num_steps=5):
    """A history with moments 1, 2, … by timestep."""
    history = LossSecondMoment(num_steps)
    t = torch.arange(num_steps).repeat(10)
    history.update(t, 1.0 + t, None)
    return history


def test_losses_that_are_not_finite_are_left_out():
    history = filled()
    expected = history.probabilities()
    history.update(torch.tensor([0, 1, 2]), torch.tensor([math.nan, math.inf, -math.inf]), None)
    assert torch.equal(history.probabilities(), expected)
    assert history.counts[:-1].tolist() == [10] * 5


def test_losses_of_0_are_drawn_uniformly():
    history = LossSecondMoment(3)
    history.update(torch.arange(3).repeat(10), torch.zeros(30), None)
    assert history.probabilities().tolist() == [1 / 3] * 3


def test_timesteps_follow_the_probabilities():
    """A fresh seed would fail once in 10⁶. And 1/(T p) makes the mean that of uniform timesteps."""
    history, n = filled(), 200_000
    p = history.probabilities()
    np.testing.assert_allclose(p, np.arange(1, 6) / 15 * 0.999 + 0.0002, rtol=1e-12)
    seeds, ids = ids_and_seeds(n)
    t, importance = history.draw(reference.first_words(3, seeds, ids))
    assert stats.chisquare(np.bincount(t), p.numpy() * n).pvalue > 1e-6
    torch.testing.assert_close(importance.double(), 1 / (5 * p[t]), rtol=1e-6, atol=0)
    weighed = importance.double() * (t + 1) ** 2  # E over uniform t is 11
    assert abs(weighed.mean() - 11) < 5 * weighed.std() / math.sqrt(n)
    ends = torch.tensor([0, 2**32 - 1])
    assert history.draw(ends)[0].tolist() == [0, 4]


def test_importance_weighs_the_loss_and_not_the_samples():
    loss = DenoisingLoss(NoiseSchedule.linear(5), timestep_sampling="loss_second_moment")
    history = filled()
    loss._history = history
    p = history.probabilities()
    for n in (4, 6):
        x0 = torch.rand(n, 2, 3, generator=torch.Generator().manual_seed(0))
        w = torch.tensor(0.5, requires_grad=True)
        result = loss(lambda x, t, w=w: w * x, x0, seed=SEED, sample_ids=range(n))
        plain = DenoisingLoss(NoiseSchedule.linear(5))(
            lambda x, t, w=w: w * x, x0, seed=SEED, sample_ids=range(n), t=result.t
        )
        assert torch.equal(result.per_sample, plain.per_sample)
        expected = (result.per_sample / (5 * p[result.t]).float()).mean()
        torch.testing.assert_close(result.loss, expected)
        (found,) = torch.autograd.grad(result.loss, w, retain_graph=True)
        (by_hand,) = torch.autograd.grad((plain.per_sample / (5 * p[result.t]).float()).mean(), w)
        torch.testing.assert_close(found, by_hand)
        p = history.probabilities()


def test_what_enters_the_history():
    loss = DenoisingLoss(NoiseSchedule.linear(5), timestep_sampling="loss_second_moment")
    x0 = torch.zeros(6, 1)
    result = loss(zero, x0, seed=0)
    counts = loss.state_dict()["loss_counts"]
    assert counts.tolist() == np.bincount(result.t, minlength=5).tolist()
    kept = loss.state_dict()["loss_history"]
    for t in range(5):
        mine = sorted(result.per_sample[result.t == t].tolist())
        assert sorted(kept[t][kept[t] > 0].tolist()) == pytest.approx(mine)
    loss(zero, x0, seed=0, t=2)
    with torch.no_grad():
        loss(zero, x0, seed=0)
    assert torch.equal(loss.state_dict()["loss_counts"], counts)


# Several processes -----------------------------------------------------------------------------


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for group_size in (None, 10):
        loss = DenoisingLoss(
            NoiseSchedule.linear(3), timestep_sampling="loss_second_moment", group_size=group_size
        )
        parts = []
        for step in range(6):
            first, end = (0, 7) if rank == 0 else (7, 10)
            rows = range(10 * step + first, 10 * step + end)
            result = loss(zero, torch.tensor(rows).float()[:, None] / 60, seed=0, sample_ids=rows)
            parts.append((result.t, result.per_sample.detach()))
        torch.save((parts, loss.state_dict()), f"{folder}/{group_size}-{rank}.pt")
    loss = DenoisingLoss(NoiseSchedule.linear(100), timestep_sampling="antithetic")
    parts = [loss(zero, torch.zeros(4, 3), seed=0) for _ in range(2)]
    parts = [(part.t, part.per_sample) for part in parts]
    torch.save((parts, loss.samples_seen), f"{folder}/own-{rank}.pt")
    small = DenoisingLoss(
        NoiseSchedule.linear(3), timestep_sampling="loss_second_moment", group_size=2
    )
    with pytest.raises(ValueError, match=f"group_size must be at least the {end - first} samples"):
        small(zero, torch.zeros(end - first, 1), seed=0)
    dist.destroy_process_group()


def test_processes_share_their_histories(tmp_path):
    """Two with 7 and 3 samples do what one with 10 does, and agree to the last bit."""
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    loss = DenoisingLoss(NoiseSchedule.linear(3), timestep_sampling="loss_second_moment")
    results = []
    for step in range(6):
        rows = range(10 * step, 10 * step + 10)
        x0 = torch.tensor(rows).float()[:, None] / 60
        results.append(loss(zero, x0, seed=0, sample_ids=rows))
    expected = loss.state_dict()
    assert expected["loss_counts"].min() >= 10  # so that probabilities mattered
    for group_size in (None, 10):
        files = [tmp_path / f"{group_size}-{rank}.pt" for rank in (0, 1)]
        (first, state0), (second, state1) = map(torch.load, files)
        for result, (t0, losses0), (t1, losses1) in zip(results, first, second, strict=True):
            assert torch.equal(torch.cat([t0, t1]), result.t)
            assert torch.equal(torch.cat([losses0, losses1]), result.per_sample)
        for name, value in expected.items():
            assert torch.equal(state0[name], value)
            assert torch.equal(state1[name], value)
    # Without ids each process takes its own.
    loss = DenoisingLoss(NoiseSchedule.linear(100), timestep_sampling="antithetic")
    (first, seen0), (second, seen1) = (torch.load(tmp_path / f"own-{rank}.pt") for rank in (0, 1))
    for (t0, losses0), (t1, losses1) in zip(first, second, strict=True):
        result = loss(zero, torch.zeros(8, 3), seed=0)
        assert torch.equal(torch.cat([t0, t1]), result.t)
        assert torch.equal(torch.cat([losses0, losses1]), result.per_sample)
    assert seen0 == seen1 == loss.samples_seen == 16
