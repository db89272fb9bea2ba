"""An accelerated GaussianDiffusion under torch.compile."""

from __future__ import annotations

import random

import pytest
import torch
from lucidrains_models import both, images
from lucidrains_package import package_or_skip
from torch._dynamo.testing import CompileCounter

package = package_or_skip()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch._dynamo"),
]

NOISES = {"torch": {"source": "torch"}, "unseeded": {}, "seeded": {"seed": 3}}
STEPS = 8


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses_of(diffusion, call):
    """Of some steps, and the gradients of them all."""
    torch.manual_seed(0)
    random.seed(0)
    losses = [call(images(seed=step)) for step in range(STEPS)]
    gradients = torch.autograd.grad(sum(losses), [*diffusion.model.parameters()])
    return torch.stack(losses).detach(), gradients


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_losses(noise, self_condition):
    """The values are those without it, and the graphs few: none of a seed or of a count."""
    _, fast = both(package, self_condition=self_condition, offset_noise_strength=0.1)
    fast.set_noise(**noise)
    expected, of_expected = losses_of(fast, fast)
    consumed = fast.noise_source.consumed
    fast.set_noise(**noise)
    counter = CompileCounter()
    found, of_found = losses_of(fast, torch.compile(fast, backend=counter))
    assert 1 <= counter.frame_count <= 3
    assert fast.noise_source.consumed == consumed == ("seed" in noise) * STEPS * 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for theirs, ours in zip(of_expected, of_found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert len(set(found.tolist())) == STEPS


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_q_sample(noise):
    _, fast = both(package)
    t = torch.tensor([0, 3, 500, 999])

    def states(q_sample):
        fast.set_noise(**noise)
        torch.manual_seed(0)
        return torch.stack([q_sample(images(), t) for _ in range(STEPS)])

    counter = CompileCounter()

    def doubled(x, t):
        return 2 * fast.q_sample(2 * x, t) / 2

    expected = states(doubled)
    assert torch.equal(states(torch.compile(doubled, backend=counter)), expected)
    assert counter.frame_count == 2  # before and after it
    assert not torch.equal(expected[0], expected[1])
