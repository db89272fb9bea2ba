"""lucidrains' GaussianDiffusion, accelerated, against the stock object: what is done beside the
model, whose output is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from comparison import ours
from torch import nn

from ddpm_fast import accelerate, randn

Compare = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def package() -> ModuleType:
    """The package's main module; where torchvision is missing, the tests' stand-in is imported."""
    lucidrains_package = pytest.importorskip("lucidrains_package")
    return lucidrains_package.package_or_skip()


class Given(nn.Module):
    """Says one thing, whatever it is asked."""

    self_condition = False

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.channels = self.out_dim = output.shape[1]
        self.output = nn.Parameter(output)

    def forward(self, x, t, x_self_cond=None):
        return self.output


def both(package: ModuleType, size: tuple[int, ...], device: torch.device, **config):
    """The stock object; accelerated copies with addressed noise and with torch's."""
    output = randn(size, seed=2, device=device)
    stock = package.GaussianDiffusion(Given(output), image_size=size[-1], **config).to(device)
    fast, torchs = accelerate(copy.deepcopy(stock)), accelerate(copy.deepcopy(stock), noise="torch")
    return stock, fast, torchs


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
def bench_p_sample(compare: Compare, package, size, objective, device):
    stock, fast, torchs = both(package, size, device, objective=objective)
    x = randn(size, seed=1, device=device)

    def check() -> None:
        torch.manual_seed(0)
        expected = stock.p_sample(x, 500)
        torch.manual_seed(0)
        torch.testing.assert_close(torchs.p_sample(x, 500), expected, rtol=1e-5, atol=1e-5)
        drawn = fast.p_sample(x, 500)[0] - expected[0]
        assert 0 < drawn.std() < 3 * stock.posterior_variance[500].sqrt()

    candidates = ours(lambda: fast.p_sample(x, 500), device)
    candidates["torch's noise"] = lambda: torchs.p_sample(x, 500)
    candidates["lucidrains"] = lambda: stock.p_sample(x, 500)
    compare(f"lucidrains p_sample {objective}", x.numel(), 16 * x.numel(), candidates, check)


def bench_ddim(compare: Compare, package, size, device, monkeypatch):
    """A trajectory of five steps, by the step; no progress bars."""
    stock, fast, torchs = both(package, size, device, sampling_timesteps=5, ddim_sampling_eta=0.5)
    tqdm = pytest.importorskip("tqdm.auto")
    for module in (package, tqdm):
        monkeypatch.setattr(module, "tqdm", lambda steps, **kwargs: steps)

    def check() -> None:
        torch.manual_seed(0)
        expected = stock.ddim_sample(size)
        torch.manual_seed(0)
        torch.testing.assert_close(torchs.ddim_sample(size), expected, rtol=1e-5, atol=1e-4)
        assert fast.ddim_sample(size).isfinite().all()

    elements = 5 * torch.Size(size).numel()
    candidates = ours(lambda: fast.ddim_sample(size), device)
    candidates["torch's noise"] = lambda: torchs.ddim_sample(size)
    candidates["lucidrains"] = lambda: stock.ddim_sample(size)
    compare("lucidrains ddim_sample, 5 steps", elements, 12 * elements, candidates, check)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
@pytest.mark.parametrize("batch", [1, 16, 128])
def bench_p_losses(compare: Compare, package, batch, objective, device):
    """The loss of a batch and its gradient; 128 is the batch of Ho et al. 2020."""
    size = (batch, 3, 32, 32)
    stock, fast, torchs = both(package, size, device, objective=objective)
    x0 = randn(size, seed=1, device=device).clamp_(-1, 1)
    t = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(diffusion) -> tuple[torch.Tensor, torch.Tensor]:
        output = diffusion.model.output
        output.grad = None
        loss = diffusion.p_losses(x0, t)
        loss.backward()
        return loss.detach(), output.grad

    def check() -> None:
        torch.manual_seed(0)
        expected = step(stock)
        torch.manual_seed(0)
        torch.testing.assert_close(step(torchs), expected, rtol=1e-5, atol=1e-9)
        loss, _ = step(fast)
        assert 0.5 < loss / expected[0] < 2

    candidates = ours(lambda: step(fast), device)
    candidates["torch's noise"] = lambda: step(torchs)
    candidates["lucidrains"] = lambda: step(stock)
    compare(f"lucidrains p_losses {objective}", x0.numel(), 16 * x0.numel(), candidates, check)
