"""add_noise with its noise against plain PyTorch, from float32 and from uint8 pixels."""

from __future__ import annotations

import torch
from comparison import OURS, SIZES
from eager import EagerAddNoise

from ddpm_fast import NoiseSchedule, add_noise, randn, reference

SCHEDULE = NoiseSchedule.linear()


def timesteps(n: int) -> torch.Tensor:
    return torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0))


def check(x0: torch.Tensor, t: torch.Tensor) -> None:
    z = randn(x0.shape, seed=1, stream=2)
    wide = reference.unit_from_pixel(x0.double()) if x0.dtype == torch.uint8 else x0.double()
    exact = reference.q_sample(wide, t, SCHEDULE, z.double())
    assert (add_noise(x0, t, SCHEDULE, seed=1).double() - exact).abs().max() < 2e-6


@SIZES
def bench_float32(compare, size):
    x0, t, eager = randn(size, seed=1).clamp(-1, 1), timesteps(size[0]), EagerAddNoise(SCHEDULE)
    candidates = {
        OURS: lambda: add_noise(x0, t, SCHEDULE, seed=1),
        "eager": lambda: eager(x0, t),
    }
    compare("add_noise float32", x0.numel(), 8 * x0.numel(), candidates, lambda: check(x0, t))


@SIZES
def bench_uint8(compare, size):
    x0 = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0)).byte()
    t, eager = timesteps(size[0]), EagerAddNoise(SCHEDULE)
    candidates = {
        OURS: lambda: add_noise(x0, t, SCHEDULE, seed=1),
        "eager": lambda: eager(x0, t),
    }
    compare("add_noise uint8", x0.numel(), 5 * x0.numel(), candidates, lambda: check(x0, t))
