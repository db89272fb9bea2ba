"""The ops have no forward-mode derivatives: asked for one they say so, and never answer 0."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from ddpm_fast import (
    NoiseSchedule,
    add_noise,
    denoising_loss,
    group_norm_silu,
    hybrid_loss,
    reverse_step,
    vlb_terms,
)

SCHEDULE = NoiseSchedule.linear(10)
TABLE = SCHEDULE.step_table(prediction="epsilon", variance="fixed_small")
T = torch.tensor([1, 2])
X0 = torch.zeros(2, 2, 3, 3)
OPS = {
    "add_noise": lambda x: add_noise(x, T, SCHEDULE, seed=0),
    "reverse_step": lambda x: reverse_step(x, X0, TABLE, 5, seed=0),
    "reverse_step of the model": lambda x: reverse_step(X0, x, TABLE, 5, seed=0),
    "denoising_loss": lambda x: denoising_loss(x, T, SCHEDULE, seed=0),
    "vlb_terms": lambda x: vlb_terms(x, X0, T, SCHEDULE, seed=0),
    "hybrid_loss": lambda x: hybrid_loss(
        torch.cat([x, x], 1), X0, T, SCHEDULE, variance="learned_range", seed=0
    ),
}
X = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3)


def by_dual_numbers(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def by_jvp(f):
    return torch.func.jvp(f, (X,), (torch.ones_like(X),))[1]


def by_nested(f):
    return torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (X,), (torch.ones_like(X),))[1]


@pytest.mark.parametrize("derivative", [by_dual_numbers, by_jvp, by_nested])
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op, derivative):
    # torch refuses torch.func.grad itself, which comes first where transforms are nested
    with pytest.raises(RuntimeError, match=r"no forward-mode derivatives|functorch transforms"):
        derivative(OPS[op])


def test_constants_beside_what_is_differentiated_are_no_matter():
    found = by_jvp(lambda x: 3 * x + add_noise(X0, T, SCHEDULE, seed=0))
    assert torch.equal(found, torch.full_like(X, 3))


def test_norms_have_them():
    expected = torch.autograd.functional.jvp(lambda x: group_norm_silu(x, 2), X, X)[1]
    found = torch.func.jvp(lambda x: group_norm_silu(x, 2), (X,), (X,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
