"""hybrid_terms: the hybrid loss and its two terms, each of which may be differentiated."""

from __future__ import annotations

import pytest
import torch
from helpers import laid_out

from ddpm_fast import NoiseSchedule, denoising_loss, randn, vlb_terms
from ddpm_fast.ops.vlb_terms import hybrid_terms

SCHEDULE = NoiseSchedule.cosine(200)
T = torch.tensor([0, 1, 150, 60])
SHAPE = (4, 3, 9, 8)
X0 = (randn(SHAPE, seed=2) * 64 + 128).clamp(0, 255).to(torch.uint8)
BOUND = {"variance": "learned_range", "seed": 5, "cdf": "tanh"}
OF_TOTAL, OF_VLB = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([1.0, 0.0, 4.0, 1.0])
USES = {
    "sum": lambda total, simple, vlb: total.sum(),
    "weighted": lambda total, simple, vlb: (total * OF_TOTAL).sum(),
    "simple": lambda total, simple, vlb: (simple * OF_TOTAL).sum(),
    "vlb": lambda total, simple, vlb: (vlb * OF_VLB).sum(),
    "simple and vlb": lambda total, simple, vlb: simple.sum() + 2 * vlb.sum(),
    "all": lambda total, simple, vlb: (total * OF_TOTAL + simple / 4 - vlb * OF_VLB).mean(),
}


def model_output(dtype=torch.float32, layout="contiguous"):
    eps = randn(SHAPE, seed=5, stream=2) + 0.3 * randn(SHAPE, seed=6)
    both = torch.cat([eps, randn(SHAPE, seed=7).tanh()], 1)
    return laid_out(both, layout).to(dtype).requires_grad_()


def together(m, weights=None):
    return hybrid_terms(m, X0, T, SCHEDULE, vlb_weights=weights, **BOUND)


def separate(m, weights=None):
    mean, v = m.chunk(2, 1)
    simple = denoising_loss(m, T, SCHEDULE, x0=X0, variance="learned_range", seed=5)
    held = torch.cat([mean.detach(), v], 1)
    vlb = vlb_terms(held, X0, T, SCHEDULE, weights=weights, **BOUND)
    return simple + vlb, simple, vlb


@pytest.mark.parametrize("weights", [None, torch.tensor([3.0, 0.1, 0.0, 1.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("use", USES)
def test_gradients(use, layout, dtype, weights):
    found, expected = [], []
    for results, function in ((found, together), (expected, separate)):
        output = model_output(dtype, layout)
        terms = function(output, weights)
        USES[use](*terms).backward()
        results += [*terms, output.grad]
    assert found[-1].dtype == dtype
    assert found[-1].any()
    for result, other in zip(found, expected, strict=True):
        close = {} if result.dtype == torch.float16 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(result, other, **close)


def test_without_gradients():
    with torch.no_grad():
        for found, expected in zip(together(model_output()), separate(model_output()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            assert not found.requires_grad


@pytest.mark.parametrize("use", ["sum", "all"])
def test_traced(use):
    gradients = []
    for function in (torch.compile(together, fullgraph=True, backend="eager"), together):
        output = model_output()
        USES[use](*function(output)).backward()
        gradients.append(output.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_needs_a_learned_variance():
    with pytest.raises(ValueError, match="'learned' or 'learned_range'; got 'fixed_small'"):
        hybrid_terms(randn(SHAPE, seed=0), X0, 0, SCHEDULE, variance="fixed_small", seed=0)


@pytest.mark.parametrize("which", ["loss", "bound", "hybrid"])
def test_a_second_derivative_is_refused(which):
    """Also where the gradient that comes in is a constant, which torch itself lets pass."""
    m = model_output()
    loss = {
        "loss": lambda: denoising_loss(m[:, :3], T, SCHEDULE, seed=5),
        "bound": lambda: vlb_terms(m, X0, T, SCHEDULE, **BOUND),
        "hybrid": lambda: hybrid_terms(m, X0, T, SCHEDULE, **BOUND)[0],
    }[which]().mean()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, m, create_graph=True)
