"""What a training step does beside the model: noise, x_t, the loss and its gradient, against plain
PyTorch. The model's output is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import compiled, ours, short_of_memory
from correctness import agree, like_randn, within
from eager import EagerTraining
from peers import Given, Missing, diffusers, lucidrains_diffusion, openai_diffusion
from results import OURS
from torch import Tensor

from ddpm_fast import NoiseSchedule, add_noise, denoising_loss, randn, reference

SCHEDULE = NoiseSchedule.linear()
# Images of 3 x 32 x 32; 128 is the batch of Ho et al. 2020.
BATCHES = {"cpu": [16, 128, 1024], "cuda": [128, 4096, 65536]}
COMPILED = {"cpu": [128], "cuda": [128, 65536]}
CHECKED = 4096  # images, at most
USUAL = [
    pytest.param(0, marks=pytest.mark.full, id="small"),
    pytest.param(1, id="usual"),
    pytest.param(2, marks=pytest.mark.full, id="large"),
]

Step = Callable[[], tuple[Tensor | None, Tensor, Tensor]]


def data(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    why = short_of_memory(device, 200 * n * 3 * 32 * 32)  # what autograd keeps of plain PyTorch
    if why:
        pytest.skip(f"{why}: losses of {n} images")
    x0 = randn([n, 3, 32, 32], seed=1, device=device).clamp_(-1, 1)
    output = randn([n, 3, 32, 32], seed=2, device=device)
    t = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0)).to(device)
    return x0, output, t


def training(step: Callable[..., Any]) -> Callable[..., Any]:
    """Benchmarks run in inference mode."""

    def run(*args: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return step(*args)

    return run


def of_loss(loss_of: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]], output: Tensor) -> Step:
    """x_t, where it is handed out, the loss, and the gradient of the model's output."""

    @training
    def step() -> tuple[Tensor | None, Tensor, Tensor]:
        m = output.detach().requires_grad_()
        found = loss_of(m)
        x_t, loss = found if isinstance(found, tuple) else (None, found)
        loss.backward()
        return x_t, loss.detach(), m.grad

    return step


def noise_in(gradient: Tensor, output: Tensor) -> Tensor:
    """ε, as the gradient 2 (m − ε) / n of its mean squared error has it."""
    m = output[:, : gradient.shape[1]].double()
    return m - gradient.double() * (m.numel() / 2)


def rule_of(x0: Tensor, output: Tensor, t: Tensor) -> Callable[[str, Step], None]:
    """The gradient says which noise was drawn: the loss, and x_t, have to be of that."""
    few = slice(0, CHECKED)
    addressed = randn(x0.shape, seed=1, stream=2, device=x0.device)

    def rule(name: str, call: Step) -> None:
        x_t, loss, gradient = call()
        eps = noise_in(gradient, output)
        if name.startswith(OURS):
            agree(name, eps, addressed, atol=2e-6)
        else:
            like_randn(name, eps, 1e-5)
        within(f"{name}, loss", (loss - (output - eps).square().mean()).abs(), 1e-5)
        if x_t is not None:
            exact = reference.q_sample(x0[few].double(), t[few], SCHEDULE, eps[few])
            agree(f"{name}, x_t", x_t[few], exact, atol=1e-5)

    return rule


@pytest.mark.parametrize("batch", USUAL)
def bench_training_step(compare, batch, device):
    n = BATCHES[device.type][batch]
    x0, output, t = data(n, device)
    eager = EagerTraining(SCHEDULE, device)
    weights = torch.full((n,), 1 / n, device=device)

    def fused(m: Tensor) -> tuple[Tensor, Tensor]:
        x_t = add_noise(x0, t, SCHEDULE, seed=1)
        return x_t, denoising_loss(m, t, SCHEDULE, seed=1, weights=weights).sum()

    candidates: dict[str, Any] = ours(of_loss(fused, output), device)
    candidates["eager"] = training(lambda: eager(output, x0, t))
    if n in COMPILED[device.type]:

        def loss_and_noised(m, x0, t):
            x_t, eps = eager.noised(x0, t)
            return x_t, torch.nn.functional.mse_loss(m, eps)

        whole = compiled(loss_and_noised, device.type)
        if not isinstance(whole, Missing):
            whole = of_loss(lambda m, whole=whole: whole(m, x0, t), output)
        candidates["torch.compile"] = whole
    candidates |= stock(x0, output, t)
    name = "training step float32"
    compare(name, x0, 16 * x0.numel(), candidates, rule=rule_of(x0, output, t))


def stock(x0: Tensor, output: Tensor, t: Tensor) -> dict[str, Any]:
    """The loss as each package's trainers write it."""
    found: dict[str, Any] = {"diffusers": diffusers()}
    if not isinstance(found["diffusers"], Missing):
        scheduler = found["diffusers"].DDPMScheduler()

        def loss_of(m: Tensor) -> tuple[Tensor, Tensor]:
            noise = torch.randn_like(x0)
            x_t = scheduler.add_noise(x0, noise, t)
            return x_t, torch.nn.functional.mse_loss(m, noise)

        found["diffusers"] = of_loss(loss_of, output)
    given = Given(output)
    theirs = lucidrains_diffusion(given, x0.shape[-1], x0.device)

    @training
    def lucidrains() -> tuple[None, Tensor, Tensor]:
        given.output.grad = None
        loss = theirs.p_losses(x0, t)
        loss.backward()
        return None, loss.detach(), given.output.grad

    found["lucidrains"] = theirs if isinstance(theirs, Missing) else lucidrains
    openai = openai_diffusion("FIXED_SMALL")
    found["OpenAI"] = of_loss(
        lambda m: openai.training_losses(lambda *_: m, x0, t)["loss"].mean(), output
    )
    return found
