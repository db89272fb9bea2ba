"""What a training step with a learned variance does beside the model: noise, x_t, L_simple + L_vlb
and their gradient, against plain PyTorch. The model's output is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_denoising_loss import (
    BATCHES,
    COMPILED,
    SCHEDULE,
    USUAL,
    Step,
    data,
    noise_in,
    of_loss,
    training,
)
from comparison import compiled, ours
from correctness import agree, like_randn
from eager import EagerHybrid
from peers import Missing, openai_diffusion
from results import OURS
from torch import Tensor

from ddpm_fast import add_noise, hybrid_loss, randn, reference

AT_ONCE = 64  # images in float64


def rule_of(x0: Tensor, output: Tensor, t: Tensor) -> Callable[[str, Step], None]:
    """The gradient of the mean's half says which noise was drawn, and with that the terms of the
    bound are those of the reference in float64, and so are the gradient of the other half, x_t and
    the loss."""
    n = len(x0)
    addressed = randn(x0.shape, seed=1, stream=2, device=x0.device)

    @training
    def exact(part: slice, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, v = output[part].double().chunk(2, 1)
        v = v.detach().clone().requires_grad_()
        x_t = reference.q_sample(x0[part].double(), t[part], SCHEDULE, eps.clone())
        terms = reference.vlb_terms(
            x0[part].double(), x_t, torch.cat([m, v], 1), t[part], SCHEDULE,
            variance="learned_range", clip=(-math.inf, math.inf),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(terms.sum() / n, [v])
        return x_t, terms.detach(), gradient

    def rule(name: str, call: Step) -> None:
        x_t, loss, gradient = call()
        mean_half, half = gradient.chunk(2, 1)
        eps = noise_in(mean_half, output)
        if name.startswith(OURS):
            agree(name, eps, addressed, atol=2e-6)
        else:
            like_randn(name, eps, 1e-5)
        bound = torch.zeros((), dtype=torch.float64, device=x0.device)
        for part in (slice(i, i + AT_ONCE) for i in range(0, n, AT_ONCE)):
            noised, terms, expected = exact(part, eps[part])
            scale = float(expected.abs().max())
            agree(f"{name}, gradient of v", half[part], expected, rtol=1e-2, atol=1e-3 * scale)
            if x_t is not None:
                agree(f"{name}, x_t", x_t[part], noised, atol=1e-5)
            bound += terms.sum() / n
        simple = (output.chunk(2, 1)[0] - eps).square().mean()
        agree(f"{name}, loss", loss, simple + bound, rtol=1e-4)

    return rule


@pytest.mark.parametrize("batch", USUAL)
def bench_training_step(compare, batch, device):
    n = BATCHES[device.type][batch]
    x0, output, t = data(n, device)
    t.clamp_(min=1)  # at t = 0 float32's tanh is another function
    output = torch.cat([output, randn(x0.shape, seed=3, device=device).tanh()], 1)
    eager, openai = EagerHybrid(SCHEDULE, device), openai_diffusion("LEARNED_RANGE", "RESCALED_MSE")
    weights = torch.full((n,), 1 / n, device=device)

    def fused(m: Tensor) -> tuple[Tensor, Tensor]:
        x_t = add_noise(x0, t, SCHEDULE, seed=1)
        loss = hybrid_loss(m, x0, t, SCHEDULE, seed=1, simple_weights=weights, vlb_weights=weights)
        return x_t, loss.sum()

    candidates: dict[str, Any] = ours(of_loss(fused, output), device)
    candidates["eager"] = training(lambda: eager(output, x0, t))
    if n in COMPILED[device.type]:
        whole = compiled(eager.loss, device.type)
        if not isinstance(whole, Missing):
            whole = of_loss(lambda m, whole=whole: whole(m, x0, t), output)
        candidates["torch.compile"] = whole
    candidates["OpenAI"] = of_loss(
        lambda m: openai.training_losses(lambda *_: m, x0, t)["loss"].mean(), output
    )
    # x_0 read and x_t written; x_0 and both halves read, their gradients written
    name = "training step, hybrid loss, float32"
    compare(name, x0, 28 * x0.numel(), candidates, rule=rule_of(x0, output, t))
