"""Terms of the variational bound against the formulas in plain PyTorch, for both kinds of variance.
x_t, which ours makes anew with its noise, is given to the others."""

from __future__ import annotations

import pytest
import torch
from bench_denoising_loss import BATCHES, COMPILED, SCHEDULE, data
from comparison import compiled, ours
from eager import EagerVlb

from ddpm_fast import add_noise, randn, reference, vlb_terms

CHECKED = 256  # images, at most


@pytest.mark.parametrize("batch", [0, 1, 2], ids=["small", "usual", "large"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def bench_vlb_terms(compare, batch, variance, device):
    n = BATCHES[device.type][batch]
    x0, output, t = data(n, device)
    t.clamp_(min=1)  # at t = 0 float32's tanh is another function
    output = (randn(x0.shape, seed=1, stream=2, device=device) + output).div_(2)
    if variance == "learned_range":
        output = torch.cat([output, randn(x0.shape, seed=3, device=device)], 1)
    x_t = add_noise(x0, t, SCHEDULE, seed=1)
    eager = EagerVlb(SCHEDULE, device)
    arguments = {"variance": variance, "seed": 1, "clip": (-1.0, 1.0)}

    def check() -> None:
        k = slice(0, CHECKED)
        eps = randn(x0[k].shape, seed=1, stream=2, device=device).double()
        noised = reference.q_sample(x0[k].double(), t[k], SCHEDULE, eps)
        exact = reference.vlb_terms(
            x0[k].double(), noised, output[k].double(), t[k], SCHEDULE,
            variance=variance, clip=(-1.0, 1.0),
        )  # fmt: skip
        found = vlb_terms(output, x0, t, SCHEDULE, **arguments)[k]
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            eager(x0[k], x_t[k], output[k], t[k]).double(), exact, rtol=1e-2, atol=1e-4
        )

    candidates = ours(lambda: vlb_terms(output, x0, t, SCHEDULE, **arguments), device)
    candidates["eager"] = lambda: eager(x0, x_t, output, t)
    if n in COMPILED[device.type]:
        whole = compiled(eager)
        candidates["torch.compile"] = lambda: whole(x0, x_t, output, t)
    nbytes = 4 * (x0.numel() + output.numel())
    name = "vlb_terms" if variance == "fixed_small" else "vlb_terms learned variance"
    compare(f"{name} float32", x0.numel(), nbytes, candidates, check)
