"""lucidrains' GaussianDiffusion, accelerated, against the stock object: what is done beside the
model, whose output is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from comparison import ours
from correctness import agree, like_randn, within
from peers import Given, Missing, lucidrains
from results import OURS

from ddpm_fast import accelerate, randn

Compare = Callable[..., dict[str, float]]
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def package() -> ModuleType:
    found = lucidrains()
    if isinstance(found, Missing):
        pytest.skip(found.why)
    return found


def both(package: ModuleType, size: tuple[int, ...], device: torch.device, **config):
    """The stock object; accelerated copies with addressed noise and with torch's."""
    output = randn(size, seed=2, device=device)
    stock = package.GaussianDiffusion(Given(output), image_size=size[-1], **config).to(device)
    fast, torchs = accelerate(copy.deepcopy(stock)), accelerate(copy.deepcopy(stock), noise="torch")
    return stock, fast, torchs


@pytest.mark.parametrize("objective", ["pred_noise", pytest.param("pred_v", marks=FULL)])
def bench_p_sample(compare: Compare, package, size, objective, device):
    stock, fast, torchs = both(package, size, device, objective=objective)
    x = randn(size, seed=1, device=device)

    def check() -> None:
        torch.manual_seed(0)
        expected = stock.p_sample(x, 500)
        torch.manual_seed(0)
        agree("torch's noise", torchs.p_sample(x, 500), expected, rtol=1e-5, atol=1e-5)
        # two draws of noise around one mean
        sigma = stock.posterior_variance[500].sqrt()
        difference = fast.p_sample(x, 500)[0].double() - expected[0].double()
        like_randn(OURS, difference / (2**0.5 * sigma.double()), 1e-3)

    candidates = ours(lambda: fast.p_sample(x, 500), device)
    candidates["torch's noise"] = lambda: torchs.p_sample(x, 500)
    candidates["lucidrains"] = lambda: stock.p_sample(x, 500)
    compare(f"lucidrains p_sample {objective}", x, 16 * x.numel(), candidates, check)


@pytest.mark.full
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
        agree("torch's noise", torchs.ddim_sample(size), expected, rtol=1e-5, atol=1e-4)
        # of other noise: as much of the picture is black, and white
        found = fast.ddim_sample(size).double()
        within(f"{OURS}, mean", (found.mean() - expected.double().mean()).abs(), 0.05)
        within(f"{OURS}, spread", (found.std() - expected.double().std()).abs(), 0.05)

    state = torch.empty(size, device="meta")
    elements = 5 * state.numel()
    candidates = ours(lambda: fast.ddim_sample(size), device)
    candidates["torch's noise"] = lambda: torchs.ddim_sample(size)
    candidates["lucidrains"] = lambda: stock.ddim_sample(size)
    compare("lucidrains ddim_sample, 5 steps", state, 12 * elements, candidates, check, calls=5)


@pytest.mark.parametrize("objective", ["pred_noise", pytest.param("pred_v", marks=FULL)])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=FULL), 16, pytest.param(128, marks=FULL)])
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
        agree("torch's noise", step(torchs), expected, rtol=1e-5, atol=1e-9)
        # the same loss, of other noise
        loss, _ = step(fast)
        within(OURS, (loss / expected[0] - 1).abs(), 20 / x0.numel() ** 0.5)

    candidates = ours(lambda: step(fast), device)
    candidates["torch's noise"] = lambda: step(torchs)
    candidates["lucidrains"] = lambda: step(stock)
    compare(f"lucidrains p_losses {objective}", x0, 16 * x0.numel(), candidates, check)
