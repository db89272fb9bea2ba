"""What a training step does beside the model: noise, x_t, the loss and its gradient, against plain
PyTorch. The model's output is given."""

from __future__ import annotations

import pytest
import torch
from comparison import compiled, ours
from eager import EagerTraining

from ddpm_fast import NoiseSchedule, add_noise, denoising_loss, randn

SCHEDULE = NoiseSchedule.linear()
# Images of 3 x 32 x 32; 128 is the batch of Ho et al. 2020.
BATCHES = {"cpu": [16, 128, 1024], "cuda": [128, 4096, 65536]}
COMPILED = {"cpu": [128], "cuda": [128, 65536]}


def data(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0 = randn([n, 3, 32, 32], seed=1, device=device).clamp_(-1, 1)
    output = randn([n, 3, 32, 32], seed=2, device=device)
    t = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0)).to(device)
    return x0, output, t


@pytest.mark.parametrize("batch", [0, 1, 2], ids=["small", "usual", "large"])
def bench_training_step(compare, batch, device):
    n = BATCHES[device.type][batch]
    x0, output, t = data(n, device)
    eager = EagerTraining(SCHEDULE, device)
    weights = torch.full((n,), 1 / n, device=device)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step() -> tuple[torch.Tensor, ...]:
        x_t = add_noise(x0, t, SCHEDULE, seed=1)
        m = output.detach().requires_grad_()
        loss = denoising_loss(m, t, SCHEDULE, seed=1, weights=weights).sum()
        loss.backward()
        return x_t, loss.detach(), m.grad

    @torch.inference_mode(False)
    @torch.enable_grad()
    def eager_step() -> tuple[torch.Tensor, ...]:
        return eager(output, x0, t)

    def check() -> None:
        _, loss, gradient = step()
        eps = randn(x0.shape, seed=1, stream=2, device=device)
        m = output.detach().requires_grad_()
        exact = torch.nn.functional.mse_loss(m.double(), eps.double())
        exact.backward()
        assert abs(loss.item() - exact.item()) < 1e-5
        torch.testing.assert_close(gradient, m.grad, rtol=1e-4, atol=1e-10)

    candidates = ours(step, device)
    candidates["eager"] = eager_step
    if n in COMPILED[device.type]:

        def loss_and_noised(m, x0, t):
            x_t, eps = eager.noised(x0, t)
            return x_t, torch.nn.functional.mse_loss(m, eps)

        whole = compiled(loss_and_noised)

        @torch.inference_mode(False)
        @torch.enable_grad()
        def compiled_step() -> tuple[torch.Tensor, ...]:
            m = output.detach().requires_grad_()
            x_t, loss = whole(m, x0, t)
            loss.backward()
            return x_t, loss.detach(), m.grad

        candidates["torch.compile"] = compiled_step
    compare("training step float32", x0.numel(), 16 * x0.numel(), candidates, check)
