"""Terms of the variational bound against the formulas in plain PyTorch, for both kinds of variance.
x_t, which ours makes anew with its noise, is given to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_denoising_loss import BATCHES, COMPILED, SCHEDULE, USUAL, data
from comparison import REFERENCE, compiled, on_reference, ours
from correctness import agree
from eager import EagerVlb
from peers import calling, openai_diffusion
from results import OURS

from ddpm_fast import add_noise, randn, reference, vlb_terms

CHECKED = 256  # images, at most


@pytest.mark.parametrize("batch", USUAL)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def bench_vlb_terms(compare, batch, variance, device, quick):
    n = BATCHES[device.type][batch]
    x0, output, t = data(n, device)
    t.clamp_(min=1)  # at t = 0 float32's tanh is another function
    output = (randn(x0.shape, seed=1, stream=2, device=device) + output).div_(2)
    if variance == "learned_range":
        output = torch.cat([output, randn(x0.shape, seed=3, device=device)], 1)
    x_t = add_noise(x0, t, SCHEDULE, seed=1)
    eager, openai = EagerVlb(SCHEDULE, device), openai_diffusion(variance.upper())
    arguments = {"variance": variance, "seed": 1, "clip": (-1.0, 1.0)}

    k = slice(0, CHECKED)
    eps = randn(x0[k].shape, seed=1, stream=2, device=device).double()
    noised = reference.q_sample(x0[k].double(), t[k], SCHEDULE, eps)
    exact = reference.vlb_terms(
        x0[k].double(), noised, output[k].double(), t[k], SCHEDULE,
        variance=variance, clip=(-1.0, 1.0),
    )  # fmt: skip

    def rule(name: str, call: Callable[[], Any]) -> None:
        found = call()
        found = (found["output"] if isinstance(found, dict) else found)[k]
        ours_too = name.startswith(OURS) or name == "reference"
        rtol, atol = (1e-4, 1e-6) if ours_too else (1e-2, 1e-4)
        agree(name, found, exact, rtol=rtol, atol=atol)

    candidates = ours(lambda: vlb_terms(output, x0, t, SCHEDULE, **arguments), device)
    candidates["eager"] = lambda: eager(x0, x_t, output, t)
    if n in COMPILED[device.type] and not (quick and variance == "fixed_small"):
        candidates["torch.compile"] = calling(compiled(eager, device.type), x0, x_t, output, t)
    candidates["OpenAI"] = lambda: openai._vb_terms_bpd(lambda *_: output, x0, x_t, t)
    if n <= REFERENCE[device.type]:
        candidates["reference"] = on_reference(candidates[OURS])
    nbytes = 4 * (x0.numel() + output.numel())
    name = "vlb_terms" if variance == "fixed_small" else "vlb_terms learned variance"
    compare(f"{name} float32", x0, nbytes, candidates, rule=rule)
