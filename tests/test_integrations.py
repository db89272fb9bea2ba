"""What the integrations share: noise sources, objects accelerated in place, tables of steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import ulp

import ddpm_fast
from ddpm_fast import NoiseSchedule, Sampler, randn, reverse_step
from ddpm_fast.integrations.accelerated import Accelerated, accelerate_object, accelerated_class
from ddpm_fast.integrations.noise import NoiseSource
from ddpm_fast.integrations.steps import Steps

SCHEDULE = NoiseSchedule.cosine(12)
CPU = torch.device("cpu")


class Stock:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def scaled(self, value: int) -> int:
        return self.factor * value


class Doubling(Accelerated):
    def scaled(self, value: int) -> int:
        return 2 * super().scaled(value)


# Noise sources ------------------------------------------------------------------------------


def test_unset_seeds_come_from_torchs_generator():
    source = NoiseSource()
    torch.manual_seed(3)
    seeds = [source.of_trajectory(CPU)[0] for _ in range(3)]
    torch.manual_seed(3)
    assert [source.of_training(4, CPU)[0] for _ in range(3)] == seeds
    assert len(set(seeds)) == 3
    assert source.consumed == 0


def test_a_seed_repeats_trajectories_and_never_training():
    source = NoiseSource(seed=7, sample_ids=[5, 6], consumed=10)
    for _ in range(2):
        seed, ids = source.of_trajectory(CPU)
        assert (seed, ids.tolist()) == (7, [5, 6])
    ids = [source.of_training(n, CPU)[1].tolist() for n in (2, 3)]
    assert ids == [[10, 11], [12, 13, 14]]
    assert source.consumed == 15


def test_processes_take_ids_of_their_own(monkeypatch):
    taken = []
    for rank, batches in enumerate([(4, 4), (2, 4), (4, 1)]):
        monkeypatch.setattr("ddpm_fast.integrations.noise.processes", lambda rank=rank: (rank, 3))
        source = NoiseSource(seed=7)
        for samples in batches:
            taken += source.of_training(samples, CPU)[1].tolist()
        assert source.consumed == 3 * sum(batches)
    assert len(taken) == len(set(taken)) == 19
    assert max(taken) < 24


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("numpy",), ValueError, "noise must be one of 'addressed', 'torch'"),
        (("addressed", -1), ValueError, "seed must lie in 0"),
        (("addressed", 1 << 64), ValueError, "seed must lie in 0"),
        (("addressed", 1.5), TypeError, "seed must be an integer"),
        (("addressed", 0, None, -1), ValueError, "consumed must lie in 0"),
        (("addressed", 0, [-1]), ValueError, "sample_ids must lie in 0"),
        (("addressed", 0, torch.tensor([3, -1])), ValueError, "sample_ids must not be negative"),
        (("addressed", 0, ["a"]), TypeError, "sample_ids must be an integer"),
        (("addressed", 0, "ab"), TypeError, "sample_ids must be integers"),
        (("addressed", 0, 3), TypeError, "sample_ids must be integers"),
        (("addressed", 0, torch.tensor([0.5])), TypeError, "sample_ids must be int64"),
        (("addressed", 0, torch.tensor([[1]])), ValueError, "sample_ids must have shape"),
        (("torch", 3), ValueError, "belong to noise='addressed'"),
        (("torch", None, [1]), ValueError, "belong to noise='addressed'"),
    ],
)
def test_bad_sources(arguments, error, message):
    with pytest.raises(error, match=message):
        NoiseSource(*arguments)


def test_a_source_is_changed_as_a_whole():
    source = NoiseSource()
    for name, value in (("source", "torch"), ("seed", 7), ("consumed", 3)):
        with pytest.raises(AttributeError):
            setattr(source, name, value)


# Objects --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_objects_change_class_in_place_and_copies_keep_it(duplicate):
    instance = Stock(5)
    assert accelerate_object(instance, Doubling, NoiseSource(seed=1)) is instance
    assert isinstance(instance, Stock)
    assert instance.scaled(3) == 30
    twin = duplicate(instance)
    assert type(twin) is type(instance) is accelerated_class(Doubling, Stock)
    assert twin.scaled(3) == 30
    assert twin.noise_source == NoiseSource(seed=1)


def test_accelerating_again_renews_the_noise_only():
    instance = accelerate_object(Stock(5), Doubling, NoiseSource(seed=1))
    accelerate_object(instance, Doubling, NoiseSource(seed=2))
    assert instance.scaled(3) == 30
    assert instance.noise_source.seed == 2
    instance.set_noise("torch")
    assert not instance.noise_source.is_addressed
    with pytest.raises(ValueError, match="seed"):
        instance.set_noise(seed=-3)
    assert instance.noise_source == NoiseSource("torch")


@pytest.mark.parametrize("stranger", [Stock(1), torch.nn.Linear(2, 2), None, "pipeline", Sampler])
def test_strangers_are_told_what_is_known(stranger):
    for call in (ddpm_fast.accelerate, Sampler.from_pipeline):
        with pytest.raises(TypeError, match="it knows") as raised:
            call(stranger)
        for known in ("DDPMPipeline", "DDIMPipeline", "denoising-diffusion", "SpacedDiffusion"):
            assert known in str(raised.value)
    assert not hasattr(stranger, "noise_source")


# Steps ----------------------------------------------------------------------------------------


def steps_of(schedule: NoiseSchedule, variance: str = "fixed_small") -> Steps:
    """The steps of step_table by their names."""
    table = schedule.step_table(prediction="epsilon", variance=variance)
    names = (
        "r",
        "c_x",
        "c_m",
        "b_0",
        "b_x",
        "b_m",
        "sigma",
        "log_variance_min",
        "log_variance_max",
    )
    columns = dict(zip(names, table.rows.flip(0).unbind(1), strict=True))
    return Steps.of(**columns, variance=variance)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_a_step_is_reverse_steps(variance, clip):
    steps = steps_of(SCHEDULE, variance)
    x = randn([3, 2, 4, 4], seed=0)
    m = randn([3, 4 if variance == "learned_range" else 2, 4, 4], seed=1)
    table = SCHEDULE.step_table(prediction="epsilon", variance=variance)
    assert len(steps) == 12
    for t in (0, 5, 11):
        ours = steps.take(x, m, t, (9, [4, 2, 8]), clip=clip)
        expected = reverse_step(
            x, m, table, 11 - t, seed=9, sample_ids=[4, 2, 8], clip=clip, return_x0=True
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        each = torch.tensor([t, t, t])
        again = steps.take(x, m, each, (9, torch.tensor([4, 2, 8])), clip=clip)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("seed", [9, (1 << 64) - 1])
def test_float64_takes_the_same_step_exactly(seed):
    steps = steps_of(SCHEDULE, "learned_range")
    x, m = randn([3, 2, 4, 4], seed=0), randn([3, 4, 4, 4], seed=1)
    for t in (0, 5, 11, torch.tensor([3, 0, 7])):
        single = steps.take(x, m, t, (seed, [4, 2, 8]), clip=(-1.0, 1.0))
        double = steps.take(x.double(), m, t, (seed, [4, 2, 8]), clip=(-1.0, 1.0))
        for a, b in zip(single, double, strict=True):
            assert b.dtype == torch.float64
            assert (a - b).abs().max() < 64 * ulp(torch.float32)
    with pytest.raises(ValueError, match="model_output must have shape"):
        steps.take(x.double(), m[:, :2].double(), 3, (seed, None), clip=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [-1, 12, torch.tensor([0, 12, 3]), torch.tensor([0, -1, 3])])
def test_timesteps_out_of_range(t, dtype):
    x = randn([3, 2, 4, 4], seed=0).to(dtype)
    name = "t" if dtype == torch.float64 or isinstance(t, torch.Tensor) else "step"
    with pytest.raises(ValueError, match=f"{name} must lie in 0 … 11"):
        steps_of(SCHEDULE).take(x, x, t, (0, None), clip=None)


def test_timesteps_as_the_kernel_reads_them():
    steps, x = steps_of(SCHEDULE), randn([3, 2, 4, 4], seed=0)
    expected = steps.take(x, x, 5, (0, None), clip=None)
    strided = torch.tensor([5, 0, 5, 0, 5, 0])[::2]
    for t in (torch.tensor(5).expand(3), strided):
        found = steps.take(x, x, t, (0, None), clip=None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for t in (torch.tensor([5, 5, 5], dtype=torch.int32), torch.tensor([5.0, 5.0, 5.0])):
        with pytest.raises(TypeError, match="t must be int64"):
            steps.take(x, x, t, (0, None), clip=None)
    with pytest.raises(ValueError, match="t must have shape"):
        steps.take(x, x, torch.tensor([5]), (0, None), clip=None)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("t", [0, 5, torch.tensor([3, 0, 7])])
def test_a_step_to_differentiate_is_the_same_step(variance, t):
    steps = steps_of(SCHEDULE, variance)
    x, m = randn([3, 2, 4, 4], seed=0), randn([3, 4, 4, 4], seed=1)
    m = m if variance == "learned_range" else m[:, :2].contiguous()
    expected = steps.take(x, m, t, (9, None), clip=(-1.0, 1.0))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, m)]
        found = steps.take(*leaves, t, (9, None), clip=(-1.0, 1.0))
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 64 * ulp(torch.float32)
        total = sum(result.square().sum() for result in found)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        gradients.append((*first, *second))
    for single, double in zip(*gradients, strict=True):
        scale = max(1.0, double.abs().max().item())
        assert (single - double).abs().max() < 256 * ulp(torch.float32) * scale
        assert double.abs().max() > 0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_results_have_the_promoted_dtype(low):
    steps = steps_of(SCHEDULE)
    x, m = randn([2, 2, 4, 4], seed=0), randn([2, 2, 4, 4], seed=1)
    for a, b, expected in (
        (x.to(low), m.to(low), low),
        (x, m.to(low), x.dtype),
        (x.to(low), m, m.dtype),
    ):
        results = steps.take(a, b, 4, (0, None), clip=None)
        assert [result.dtype for result in results] == [expected] * 2


# What samplers accept of models ----------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped", [lambda m: m, lambda m: (m, "more"), lambda m: type("Out", (), {"sample": m})()]
)
def test_calling_conventions_of_models(wrapped):
    told = []

    def model(x, t):
        told.append(t)
        return wrapped(0.1 * x)

    plain = Sampler(lambda x, t: 0.1 * x, SCHEDULE, num_steps=4)
    expected = plain.sample([2, 1, 4, 4], seed=3)
    for timesteps, dtype in (
        (None, torch.int64),
        (torch.arange(12), torch.int64),
        (torch.arange(12) * 2.5, torch.float32),
        ([1000 / 12 * t for t in range(12)], torch.float32),
    ):
        told.clear()
        sampler = Sampler(model, SCHEDULE, num_steps=4, model_timesteps=timesteps)
        assert torch.equal(sampler.sample([2, 1, 4, 4], seed=3), expected)
        values = torch.arange(12) if timesteps is None else torch.as_tensor(timesteps)
        assert [t.dtype for t in told] == [dtype] * 4
        assert torch.equal(torch.stack(told)[:, 0], values[[9, 6, 3, 0]].to(dtype))


@pytest.mark.parametrize(
    ("timesteps", "error"),
    [
        (range(11), ValueError),
        ([[1.0] * 12], ValueError),
        (["a"] * 12, TypeError),
        ([True] * 12, ValueError),
    ],
)
def test_bad_model_timesteps(timesteps, error):
    with pytest.raises(error, match="model_timesteps must be"):
        Sampler(lambda x, t: x, SCHEDULE, model_timesteps=timesteps)
