"""add_noise with its noise against plain PyTorch, from float32 and from uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import COMPILED, REFERENCE, compiled, on_reference, ours
from correctness import agree, like_randn
from eager import EagerAddNoise
from peers import (
    Given,
    Maybe,
    Missing,
    calling,
    diffusers,
    lucidrains_diffusion,
    openai_diffusion,
)
from results import OURS

from ddpm_fast import NoiseSchedule, add_noise, randn, reference

SCHEDULE = NoiseSchedule.linear()
CHECKED = 16384  # images, at most: in float64 they take a gigabyte


def timesteps(n: int, device: torch.device) -> torch.Tensor:
    t = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0))
    return t.to(device)


def rule_of(x0: torch.Tensor, t: torch.Tensor) -> Callable[[str, Callable[[], Any]], None]:
    """Ours to float32's rounding; of the others, whose noise is their own, what is not signal."""
    few, at = x0[:CHECKED], t[:CHECKED]
    wide = reference.unit_from_pixel(few.double()) if x0.dtype == torch.uint8 else few.double()
    z = randn(few.shape, seed=1, stream=2, device=x0.device)
    exact = reference.q_sample(wide, at, SCHEDULE, z.double())
    signal = reference.q_sample(wide, at, SCHEDULE, torch.zeros_like(wide))
    sigma = reference.q_sample(torch.zeros_like(wide), at, SCHEDULE, torch.ones_like(wide))

    def rule(name: str, call: Callable[[], Any]) -> None:
        found = call()[:CHECKED].double()
        if name.startswith(OURS) or name == "reference":
            agree(name, found, exact, atol=2e-6)
        else:
            like_randn(name, (found - signal) / sigma, 1e-3)

    return rule


def from_diffusers(x0: torch.Tensor, t: torch.Tensor) -> Maybe:
    package = diffusers()
    if isinstance(package, Missing):
        return package
    scheduler = package.DDPMScheduler()
    return lambda: scheduler.add_noise(x0, torch.randn_like(x0), t)


def from_lucidrains(x0: torch.Tensor, t: torch.Tensor) -> Maybe:
    theirs = lucidrains_diffusion(Given(x0[:1].clone()), x0.shape[-1], x0.device)
    return theirs if isinstance(theirs, Missing) else lambda: theirs.q_sample(x0, t)


def compared(compare: Any, case: str, x0: torch.Tensor, nbytes: int, whole: bool) -> None:
    n, device = len(x0), x0.device
    t, eager = timesteps(n, device), EagerAddNoise(SCHEDULE, device)
    candidates = ours(lambda: add_noise(x0, t, SCHEDULE, seed=1), device)
    candidates["eager"] = lambda: eager(x0, t)
    if whole and n in COMPILED[device.type]:
        candidates["torch.compile"] = calling(compiled(eager, device.type), x0, t)
    if x0.dtype == torch.float32:
        openai = openai_diffusion("FIXED_SMALL")
        candidates["diffusers"] = from_diffusers(x0, t)
        candidates["lucidrains"] = from_lucidrains(x0, t)
        candidates["OpenAI"] = lambda: openai.q_sample(x0, t)
    if n <= REFERENCE[device.type]:
        candidates["reference"] = on_reference(candidates[OURS])
    compare(case, x0, nbytes, candidates, rule=rule_of(x0, t))


def bench_float32(compare, size, device):
    x0 = randn(size, seed=1, device=device).clamp_(-1, 1)
    compared(compare, "add_noise float32", x0, 8 * x0.numel(), True)


def bench_uint8(compare, size, device, quick):
    x0 = randn(size, seed=1, device=device).mul_(50).add_(128).clamp_(0, 255).to(torch.uint8)
    if quick and size[0] not in COMPILED[device.type]:
        pytest.skip("quick: sizes that --quick leaves out")
    compared(compare, "add_noise uint8", x0, 5 * x0.numel(), not quick)
