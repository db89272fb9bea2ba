"""A step of diffusers' schedulers against the same step of the fast ones, along a trajectory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from results import OURS  # noqa: E402

from ddpm_fast import randn  # noqa: E402
from ddpm_fast.integrations.diffusers.schedulers import (  # noqa: E402
    FastDDIMScheduler,
    FastDDPMScheduler,
)

FAST = {DDPMScheduler: FastDDPMScheduler, DDIMScheduler: FastDDIMScheduler}
SHAPES = [(1, 3, 32, 32), (16, 3, 32, 32), (16, 3, 256, 256)]
SMALL, MIDDLE = SHAPES[:2]

# Where the stock code may be hard to beat: most of the time is torch's own, in both.
CONFIGS: dict[str, tuple[type, dict[str, Any], dict[str, Any], torch.dtype]] = {
    "ddpm threshold": (DDPMScheduler, {"thresholding": True}, {}, torch.float32),
    "ddim threshold": (DDIMScheduler, {"thresholding": True}, {}, torch.float32),
    "ddpm learned_range": (DDPMScheduler, {"variance_type": "learned_range"}, {}, torch.float32),
    "ddpm learned": (DDPMScheduler, {"variance_type": "learned"}, {}, torch.float32),
    "ddpm v": (DDPMScheduler, {"prediction_type": "v_prediction"}, {}, torch.float32),
    "ddpm no clip": (DDPMScheduler, {"clip_sample": False}, {}, torch.float32),
    "ddim eta": (DDIMScheduler, {}, {"eta": 1.0}, torch.float32),
    "ddim clipped": (DDIMScheduler, {}, {"use_clipped_model_output": True}, torch.float32),
    "ddpm float64": (DDPMScheduler, {}, {}, torch.float64),
    "ddim float64": (DDIMScheduler, {}, {}, torch.float64),
    "ddpm bfloat16": (DDPMScheduler, {}, {}, torch.bfloat16),
    "ddim bfloat16": (DDIMScheduler, {}, {}, torch.bfloat16),
    "ddpm float16": (DDPMScheduler, {}, {}, torch.float16),
}


def stepping(
    scheduler: Any, x: torch.Tensor, m: torch.Tensor, generator: torch.Generator | None, **more: Any
) -> Callable[[], object]:
    """A step at the next timestep of the list, from the same state: t = 0 is left out."""
    timesteps = itertools.cycle(list(scheduler.timesteps[:-1]))
    return lambda: scheduler.step(m, next(timesteps), x, generator=generator, **more)


def compare_steps(
    compare: Any,
    device: torch.device,
    case: str,
    stock: type,
    config: dict[str, Any],
    more: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    with_generator: bool,
) -> None:
    schedulers = {OURS: FAST[stock](**config), "diffusers": stock(**config)}
    doubled = str(config.get("variance_type", "")).startswith("learned")
    x = randn(shape, seed=1, device=device).to(dtype)
    m = randn((shape[0], (1 + doubled) * shape[1], *shape[2:]), seed=2, device=device).to(dtype)
    m[:, shape[1] :] = m[:, shape[1] :].abs() / 10  # a variance, or a fraction of one
    candidates = {}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(1000)
        generator = torch.Generator(device).manual_seed(0) if with_generator else None
        candidates[name] = stepping(scheduler, x, m, generator, **more)

    def check() -> None:
        both = [
            s.step(m, 500, x, generator=torch.Generator(device).manual_seed(1), **more).prev_sample
            for s in schedulers.values()
        ]
        scale = max(1.0, both[1].abs().max().item())
        tolerance = 4 * torch.finfo(min(dtype, torch.float32, key=lambda d: d.itemsize)).eps
        assert (both[0].double() - both[1].double()).abs().max() < tolerance * scale * 4

    element = 4 if dtype == torch.float32 else dtype.itemsize
    moved = (3 * element + 4) * x.numel()
    compare(case, x.numel(), moved, candidates, check)


@pytest.mark.parametrize("with_generator", [False, True], ids=["", "generator"])
@pytest.mark.parametrize("stock", FAST, ids=["ddpm", "ddim"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_step(compare, device, shape, stock, with_generator):
    name = "ddpm" if stock is DDPMScheduler else "ddim"
    case = f"scheduler {name}{' generator' if with_generator else ''}"
    compare_steps(compare, device, case, stock, {}, {}, shape, torch.float32, with_generator)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def bench_configurations(compare, device, config, shape):
    """No slower than the stock step in any of them."""
    stock, settings, more, dtype = CONFIGS[config]
    compare_steps(
        compare, device, f"scheduler {config}", stock, settings, more, shape, dtype, False
    )


def whole(scheduler: Any, num_steps: int, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """A trajectory as a pipeline has it, without the model."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(m, t, x).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 4, 10])
@pytest.mark.parametrize("stock", FAST, ids=["ddpm", "ddim"])
def bench_short_trajectories(compare, device, stock, num_steps):
    """Where what a list of timesteps costs is not spread over many steps."""
    x, m = (randn(SMALL, seed=seed, device=device) for seed in (1, 2))
    schedulers = {OURS: FAST[stock](), "diffusers": stock()}
    schedulers[OURS].set_noise("torch")
    candidates = {
        name: lambda scheduler=scheduler: whole(scheduler, num_steps, x, m)
        for name, scheduler in schedulers.items()
    }

    def check() -> None:
        both = []
        for scheduler in schedulers.values():
            torch.manual_seed(3)
            both.append(whole(scheduler, num_steps, x, m))
        assert (both[0] - both[1]).abs().max() < 1e-4
        schedulers[OURS].set_noise()

    name = "ddpm" if stock is DDPMScheduler else "ddim"
    moved = 16 * num_steps * x.numel()
    case = f"scheduler {name} trajectory of {num_steps}"
    compare(case, num_steps * x.numel(), moved, candidates, check)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=str)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def bench_forward_process(compare, device, method, shape):
    x, eps = (randn(shape, seed=seed, device=device) for seed in (1, 2))
    t = torch.arange(shape[0], device=device) * 50
    methods = {
        OURS: getattr(FastDDPMScheduler(), method),
        "diffusers": getattr(DDPMScheduler(), method),
    }
    candidates = {name: lambda call=call: call(x, eps, t) for name, call in methods.items()}

    def check() -> None:
        ours, theirs = (call(x, eps, t) for call in methods.values())
        assert (ours - theirs).abs().max() < 1e-5

    compare(f"scheduler {method}", x.numel(), 12 * x.numel(), candidates, check)
