"""add_noise with its noise against plain PyTorch, from float32 and from uint8 pixels."""

from __future__ import annotations

import torch
from comparison import COMPILED, compiled, ours
from eager import EagerAddNoise

from ddpm_fast import NoiseSchedule, add_noise, randn, reference

SCHEDULE = NoiseSchedule.linear()
CHECKED = 16384  # images, at most: in float64 they take a gigabyte


def timesteps(n: int, device: torch.device) -> torch.Tensor:
    t = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0))
    return t.to(device)


def check(x0: torch.Tensor, t: torch.Tensor) -> None:
    x0, t = x0[:CHECKED], t[:CHECKED]
    z = randn(x0.shape, seed=1, stream=2, device=x0.device)
    wide = reference.unit_from_pixel(x0.double()) if x0.dtype == torch.uint8 else x0.double()
    exact = reference.q_sample(wide, t, SCHEDULE, z.double())
    assert (add_noise(x0, t, SCHEDULE, seed=1).double() - exact).abs().max() < 2e-6


def compared(compare, case: str, x0: torch.Tensor, nbytes: int) -> None:
    t, eager = timesteps(len(x0), x0.device), EagerAddNoise(SCHEDULE, x0.device)
    candidates = ours(lambda: add_noise(x0, t, SCHEDULE, seed=1), x0.device)
    candidates["eager"] = lambda: eager(x0, t)
    if x0.is_cuda and len(x0) in COMPILED["cuda"]:
        whole = compiled(eager)
        candidates["torch.compile"] = lambda: whole(x0, t)
    compare(case, x0.numel(), nbytes, candidates, lambda: check(x0, t))


def bench_float32(compare, size, device):
    x0 = randn(size, seed=1, device=device).clamp_(-1, 1)
    compared(compare, "add_noise float32", x0, 8 * x0.numel())


def bench_uint8(compare, size, device):
    x0 = randn(size, seed=1, device=device).mul_(50).add_(128).clamp_(0, 255).to(torch.uint8)
    compared(compare, "add_noise uint8", x0, 5 * x0.numel())
