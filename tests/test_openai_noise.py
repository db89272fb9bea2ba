"""Addressed noise of accelerated OpenAI objects."""

from __future__ import annotations

import pytest
import torch
from openai_cases import SHAPE, diffusion_of, model_of, start

from ddpm_fast import accelerate, randn

pytestmark = pytest.mark.usefixtures("one_thread")
LOOPS = {"p_sample_loop": {}, "ddim_sample_loop": {"eta": 0.5}}


def exact_model(x, t, **kwargs):
    """Without a function that vectors and their remainders round differently."""
    return 0.5 * x + 0.001 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def samples_of(diffusion, method="p_sample_loop", shape=SHAPE):
    return getattr(diffusion, method)(exact_model, shape, device="cpu", **LOOPS[method])


@pytest.mark.parametrize("method", LOOPS)
def test_the_split_into_batches_does_not_matter(method):
    ids = [7, 0, 2**40, 3]
    fast = accelerate(diffusion_of(spacing="10"), seed=4, sample_ids=ids)
    expected = samples_of(fast, method)
    parts = []
    for part in (slice(1), slice(1, 4)):
        fast.set_noise(seed=4, sample_ids=torch.tensor(ids[part]))
        parts.append(samples_of(fast, method, shape=(len(ids[part]), *SHAPE[1:])))
    assert torch.equal(torch.cat(parts), expected)
    fast.set_noise(seed=5, sample_ids=ids)
    assert not torch.equal(samples_of(fast, method), expected)
    fast.set_noise()
    assert not torch.equal(samples_of(fast, method), samples_of(fast, method))


def test_a_step_alone_has_the_noise_of_the_loop():
    fast = accelerate(diffusion_of(spacing="10"), seed=4)
    x = randn(SHAPE, seed=4)
    loop = fast.p_sample_loop_progressive(exact_model, SHAPE, device="cpu")
    for i, out in zip(reversed(range(10)), loop, strict=True):
        alone = fast.p_sample(exact_model, x, torch.full((4,), i))
        assert torch.equal(alone["sample"], out["sample"])
        x = out["sample"]


def test_conditions_in_float64_have_the_noise_of_their_timesteps():
    """A cond_fn that says nothing changes nothing but the mean's digits, which float32 makes."""
    fast = accelerate(diffusion_of("guided", variance="LEARNED_RANGE"), seed=4)
    x, t, model = (
        start(torch.float64),
        torch.tensor([0, 5, 19, 1]),
        model_of("EPSILON", "LEARNED_RANGE"),
    )
    options = {"cond_fn": lambda x, t: torch.zeros_like(x), "model_kwargs": {}}
    expected = fast.p_sample(model, x, t)["sample"]
    found = fast.p_sample(model, x, t, **options)["sample"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_addressed_loops_begin_in_the_default_dtype(loop):
    """As torch.randn's do."""
    fast = accelerate(diffusion_of("guided"), seed=4)
    single = samples_of(fast, loop)
    assert single.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        double = samples_of(fast, loop)
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)
