"""Where a step's noise comes from: generators' streams, torch's, and addresses."""

from __future__ import annotations

import copy
from importlib import import_module
from itertools import pairwise

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import BOTH, SHAPE, generator, output_of_model, pair  # noqa: E402

from ddpm_fast import randn  # noqa: E402
from ddpm_fast.integrations.noise import NoiseSource  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

X, M = randn(SHAPE, seed=1), output_of_model(0)


def noisy(scheduler):
    return {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}


def noise_of(scheduler, t, m=M, x=X, **arguments):
    """What a step added, in units of what one of known noise adds."""
    copied = copy.deepcopy(scheduler)
    copied.set_noise("torch")
    with_noise, without, unit = (
        s.step(m, t, x, **noisy(s), **a).prev_sample
        for s, a in (
            (scheduler, arguments),
            (copied, {"generator": Fixed(0.0)}),
            (copied, {"generator": Fixed(1.0)}),
        )
    )
    return (with_noise - without) / (unit - without)


class Fixed(torch.Generator):
    """Stands for noise of one value; see the fixture."""

    def __new__(cls, value):
        made = super().__new__(cls, device="cpu")
        made.value = value
        return made


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch):
    module = import_module("ddpm_fast.integrations.diffusers.arguments")
    real = module.randn_tensor

    def drawn(shape, generator=None, **arguments):
        if isinstance(generator, Fixed):
            return torch.full(shape, generator.value, dtype=arguments["dtype"])
        return real(shape, generator=generator, **arguments)

    monkeypatch.setattr(module, "randn_tensor", drawn)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("kind", ["one", "list", "list of one", "torch's own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_streams_stand_where_the_stock_step_leaves_them(stock, kind, dtype):
    stock, fast = pair(stock, 8)
    fast.set_noise("torch")
    m, x = M.to(dtype), X.to(dtype)
    states = []
    for scheduler in (stock, fast):
        given = {
            "one": generator(3),
            "list": [generator(3), generator(4)],
            "list of one": [generator(3)],
            "torch's own": None,
        }[kind]
        torch.manual_seed(11)
        for t in scheduler.timesteps:
            scheduler.step(m, t, x, generator=given, **noisy(scheduler))
        several = given if isinstance(given, list) else [given]
        states.append([torch.get_rng_state() if g is None else g.get_state() for g in several])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_generators_are_drawn_from_exactly_where_the_stock_steps_do():
    drawn = generator(0)
    at_start = drawn.get_state()
    _, ddpm = pair(DDPMScheduler)
    ddpm.step(M, 0, X, drawn)
    _, ddim = pair(DDIMScheduler, 5)
    ddim.step(M, 800, X, 0.0, generator=drawn)
    assert torch.equal(drawn.get_state(), at_start)
    ddim.step(M, 0, X, 1e-9, generator=drawn)  # σ is 0 there, and the stock step draws
    once = generator(0)
    torch.randn(SHAPE, generator=once)
    assert torch.equal(drawn.get_state(), once.get_state())


@pytest.mark.parametrize("stock", BOTH)
def test_addressed_noise_is_that_of_the_reverse_steps_stream(stock):
    _, fast = pair(stock, 10)
    fast.set_noise(seed=2**64 - 3, sample_ids=[41, 2**50])
    for t in (900, 100):
        expected = randn(SHAPE, seed=2**64 - 3, sample_ids=[41, 2**50], stream=1, index=t)
        assert (noise_of(fast, t) - expected).abs().max() < 2e-4
        in_float64 = noise_of(fast, t, M.double(), X.double())
        assert (in_float64 - expected).abs().max() < 1e-6
    ids = torch.tensor([41, 2**50])
    before = fast.step(M, 900, X, **noisy(fast)).prev_sample
    fast.set_noise(seed=2**64 - 3, sample_ids=ids)
    assert torch.equal(fast.step(M, 900, X, **noisy(fast)).prev_sample, before)


@pytest.mark.parametrize("stock", BOTH)
def test_a_seed_decides_everything(stock):
    _, fast = pair(stock, 6)

    def walk():
        fast.set_timesteps(6)
        x = X
        for t in fast.timesteps:
            x = fast.step(M, t, x, **noisy(fast)).prev_sample
        return x

    fast.set_noise(seed=5)
    first = walk()
    torch.manual_seed(99)
    assert torch.equal(walk(), first)
    fast.set_noise(seed=6)
    assert not torch.equal(walk(), first)


@pytest.mark.parametrize("stock", BOTH)
def test_without_a_seed_every_trajectory_has_its_own_from_torch(stock):
    _, fast = pair(stock, 4)

    def seeds(timesteps):
        found = []
        for t in timesteps:
            fast.step(M, t, X, **noisy(fast))
            found.append(fast._seed)
        return found

    torch.manual_seed(1)
    first = seeds(fast.timesteps[:-1])
    assert len(set(first)) == 1  # one a trajectory
    torch.manual_seed(1)
    assert fast.step(M, 750, X, **noisy(fast)) is not None  # 750 does not come after 250
    assert fast._seed == first[0]
    fast.set_timesteps(4)
    again = seeds(fast.timesteps[:-1])
    assert len(set(again)) == 1
    assert again[0] != first[0]
    repeated = seeds([750, 750, 500, 500, 250])  # new wherever t does not go down
    assert [a != b for a, b in pairwise(repeated)] == [
        True,
        False,
        True,
        False,
    ]
    each = seeds([torch.tensor([500, 250]), torch.tensor([250, 250]), torch.tensor([250, 0])])
    assert len(set(each)) == 3  # several timesteps belong to several trajectories


@pytest.mark.parametrize("stock", BOTH)
def test_set_timesteps_begins_a_trajectory_wherever_it_starts(stock):
    _, fast = pair(stock, 4)
    fast.step(M, 750, X, **noisy(fast))
    before = fast._seed
    fast.step(M, 500, X, **noisy(fast))
    assert fast._seed == before
    fast.set_timesteps(4)
    fast.step(M, 250, X, **noisy(fast))  # as from an image, further down
    assert fast._seed != before


def test_sample_ids_are_those_that_were_given():
    _, fast = pair(DDPMScheduler)
    ids = [1, 2]
    fast.set_noise(seed=3, sample_ids=ids)
    first = fast.step(M, 500, X).prev_sample
    assert torch.equal(fast.step(M, 500, X).prev_sample, first)
    ids[1] = 9
    assert torch.equal(fast.step(M, 500, X).prev_sample, first)
    fast.set_noise(seed=3, sample_ids=torch.tensor(ids))
    second = fast.step(M, 500, X).prev_sample
    assert torch.equal(second[0], first[0])
    assert not torch.equal(second[1], first[1])
    with pytest.raises(ValueError, match="sample_ids"):
        fast.step(M[:1], 500, X[:1])


def test_the_seed_is_drawn_where_it_is_needed_and_no_earlier():
    _, fast = pair(DDIMScheduler, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for t in fast.timesteps:
        fast.step(M, t, X)
        fast.step(M, t, X, 1.0, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_low_precision_takes_the_noise_in_float32():
    _, fast = pair(DDPMScheduler)
    fast.set_noise(seed=3)
    wide = fast.step(M.bfloat16().float(), 500, X.bfloat16().float()).prev_sample
    narrow = fast.step(M.bfloat16(), 500, X.bfloat16()).prev_sample
    assert torch.equal(narrow, wide.bfloat16())


def test_a_noise_source_of_one_scheduler_is_not_anothers():
    _, one = pair(DDPMScheduler)
    _, two = pair(DDPMScheduler)
    one.set_noise(seed=3)
    assert two.noise_source == NoiseSource()
    assert one.noise_source == NoiseSource(seed=3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([generator(0)] * 3, None, ""),
        ((generator(0), generator(1)), TypeError, "torch.Generator or a list of them; got tuple"),
        (7, TypeError, "got int"),
        ([generator(0), None], TypeError, "got NoneType"),
    ],
)
def test_generators_that_do_not_fit(given, error, words):
    _, fast = pair(DDPMScheduler)
    if error is None:
        fast.step(M, 10, X, given)
        return
    with pytest.raises(error, match=words):
        fast.step(M, 10, X, given)


def test_too_few_generators():
    _, fast = pair(DDPMScheduler)
    x = randn((3, 3, 4, 4), seed=0)
    with pytest.raises(ValueError, match="one a sample, 3; got 2"):
        fast.step(x, 10, x, [generator(0), generator(1)])


def test_a_generator_of_another_device(monkeypatch):
    class OnGpu(torch.Generator):
        device = torch.device("cuda:1")

    _, fast = pair(DDPMScheduler)
    with pytest.raises(ValueError, match="generator is on cuda:1 and the sample on cpu"):
        fast.step(M, 10, X, OnGpu())


def test_ddim_takes_a_generator_or_noise():
    _, fast = pair(DDIMScheduler, 5)
    with pytest.raises(ValueError, match="not both"):
        fast.step(M, 800, X, 1.0, generator=generator(0), variance_noise=X)
    fast.step(M, 800, X, 0.0, generator=generator(0), variance_noise=X)  # as in the stock step
    with pytest.raises(ValueError, match=r"variance_noise must have shape \[2, 3, 6, 5\]"):
        fast.step(M, 800, X, 1.0, variance_noise=X[:, :2])
    with pytest.raises(ValueError, match="must be a tensor on cpu"):
        fast.step(M, 800, X, 1.0, variance_noise=0.5)
