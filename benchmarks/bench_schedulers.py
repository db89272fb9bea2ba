"""A step of diffusers' schedulers against the same step of the fast ones, along a trajectory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from correctness import agree
from peers import Missing, diffusers
from redrawn import REVERSE, drawing, redrawn, seeded
from results import OURS

from ddpm_fast import randn

FULL = pytest.mark.full
METHODS = ["DDPM", "DDIM"]
SMALL, MIDDLE, LARGE = (1, 3, 32, 32), (16, 3, 32, 32), (16, 3, 256, 256)


Classes = dict[str, dict[str, Any]]

# Where the stock code may be hard to beat: most of the time is torch's own, in both.
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], torch.dtype]] = {
    "ddpm threshold": ("DDPM", {"thresholding": True}, {}, torch.float32),
    "ddim threshold": ("DDIM", {"thresholding": True}, {}, torch.float32),
    "ddpm learned_range": ("DDPM", {"variance_type": "learned_range"}, {}, torch.float32),
    "ddpm learned": ("DDPM", {"variance_type": "learned"}, {}, torch.float32),
    "ddpm v": ("DDPM", {"prediction_type": "v_prediction"}, {}, torch.float32),
    "ddpm no clip": ("DDPM", {"clip_sample": False}, {}, torch.float32),
    "ddim eta": ("DDIM", {}, {"eta": 1.0}, torch.float32),
    "ddim clipped": ("DDIM", {}, {"use_clipped_model_output": True}, torch.float32),
    "ddpm float64": ("DDPM", {}, {}, torch.float64),
    "ddim float64": ("DDIM", {}, {}, torch.float64),
    "ddpm bfloat16": ("DDPM", {}, {}, torch.bfloat16),
    "ddim bfloat16": ("DDIM", {}, {}, torch.bfloat16),
    "ddpm float16": ("DDPM", {}, {}, torch.float16),
}


@pytest.fixture(scope="module")
def classes() -> Classes:
    """Of each method: the fast scheduler, and the stock one."""
    package = diffusers()
    if isinstance(package, Missing):
        pytest.skip(package.why)
    from ddpm_fast.integrations.diffusers.schedulers import FastDDIMScheduler, FastDDPMScheduler

    return {
        "DDPM": {OURS: FastDDPMScheduler, "diffusers": package.DDPMScheduler},
        "DDIM": {OURS: FastDDIMScheduler, "diffusers": package.DDIMScheduler},
    }


def stepping(
    scheduler: Any, x: torch.Tensor, m: torch.Tensor, generator: torch.Generator | None, **more: Any
) -> Callable[[], object]:
    """A step at the next timestep of the list, from the same state: t = 0 is left out."""
    timesteps = itertools.cycle(list(scheduler.timesteps[:-1]))
    return lambda: scheduler.step(m, next(timesteps), x, generator=generator, **more)


def drawn_by(method: str) -> str:
    """What the stock scheduler calls for its noise."""
    return f"diffusers.schedulers.scheduling_{method.lower()}.randn_tensor"


def compare_steps(
    compare: Any,
    device: torch.device,
    case: str,
    method: str,
    classes: dict[str, Any],
    config: dict[str, Any],
    more: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    with_generator: bool,
) -> None:
    schedulers = {name: scheduler(**config) for name, scheduler in classes.items()}
    doubled = str(config.get("variance_type", "")).startswith("learned")
    x = randn(shape, seed=1, device=device).to(dtype)
    m = randn((shape[0], (1 + doubled) * shape[1], *shape[2:]), seed=2, device=device).to(dtype)
    m[:, shape[1] :] = m[:, shape[1] :].abs() / 10  # a variance, or a fraction of one
    candidates = {}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(1000)
        generator = torch.Generator(device).manual_seed(0) if with_generator else None
        candidates[name] = stepping(scheduler, x, m, generator, **more)

    tolerance = 16 * torch.finfo(min(dtype, torch.float32, key=lambda d: d.itemsize)).eps

    def rule(name: str, call: Callable[[], Any]) -> None:
        """The stock step at the first timestep, of the noise that was drawn."""
        seed, t = seeded(), schedulers[OURS].timesteps[0]
        found = call().prev_sample
        noise = redrawn(x, seed, REVERSE, int(t)) if name == OURS else torch.zeros_like(x)
        torch.manual_seed(0)
        if with_generator or name != OURS:  # their generator began at 0
            generator = torch.Generator(device).manual_seed(0) if with_generator else None
            expected = schedulers["diffusers"].step(m, t, x, generator=generator, **more)
        else:
            with drawing(drawn_by(method), [noise]):
                expected = schedulers["diffusers"].step(m, t, x, **more)
        scale = max(1.0, expected.prev_sample.abs().max().item())
        agree(name, found, expected.prev_sample, atol=tolerance * scale)

    element = 4 if dtype == torch.float32 else dtype.itemsize
    moved = (3 * element + 4) * x.numel()
    compare(case, x, moved, candidates, rule=rule, seconds=0.7)


@pytest.mark.parametrize(
    "with_generator", [False, pytest.param(True, marks=FULL)], ids=["", "generator"]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [MIDDLE, *(pytest.param(shape, marks=FULL) for shape in (SMALL, LARGE))], ids=str
)
def bench_step(compare, device, classes, shape, method, with_generator):
    case = f"scheduler {method.lower()}{' generator' if with_generator else ''}"
    compare_steps(
        compare, device, case, method, classes[method], {}, {}, shape, torch.float32, with_generator
    )


@pytest.mark.full
@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def bench_configurations(compare, device, classes, config, shape):
    """No slower than the stock step in any of them."""
    method, settings, more, dtype = CONFIGS[config]
    compare_steps(
        compare, device, f"scheduler {config}", method, classes[method], settings, more, shape,
        dtype, False,
    )  # fmt: skip


def whole(scheduler: Any, num_steps: int, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """A trajectory as a pipeline has it, without the model."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(m, t, x).prev_sample
    return x


@pytest.mark.full
@pytest.mark.parametrize("num_steps", [1, 4, 10])
@pytest.mark.parametrize("method", METHODS)
def bench_short_trajectories(compare, device, classes, method, num_steps):
    """Where what a list of timesteps costs is not spread over many steps."""
    x, m = (randn(SMALL, seed=seed, device=device) for seed in (1, 2))
    schedulers = {name: scheduler() for name, scheduler in classes[method].items()}
    candidates = {
        name: lambda scheduler=scheduler: whole(scheduler, num_steps, x, m)
        for name, scheduler in schedulers.items()
    }

    def rule(name: str, call: Callable[[], torch.Tensor]) -> None:
        """The stock trajectory, of the noise that was drawn."""
        seed = seeded()
        found = call()
        torch.manual_seed(0)
        if name == OURS:
            at = [int(t) for t in schedulers[OURS].timesteps]
            with drawing(drawn_by(method), [redrawn(x, seed, REVERSE, t) for t in at]):
                expected = whole(schedulers["diffusers"], num_steps, x, m)
        else:
            expected = whole(schedulers["diffusers"], num_steps, x, m)
        agree(name, found, expected, atol=1e-4)

    moved = 16 * num_steps * x.numel()
    case = f"scheduler {method.lower()} trajectory of {num_steps}"
    compare(case, x, moved, candidates, rule=rule, seconds=0.7, calls=num_steps)


@pytest.mark.full
@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=str)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def bench_forward_process(compare, device, classes, method, shape):
    x, eps = (randn(shape, seed=seed, device=device) for seed in (1, 2))
    t = torch.arange(shape[0], device=device) * 50
    methods = {name: getattr(each(), method) for name, each in classes["DDPM"].items()}
    candidates = {name: lambda call=call: call(x, eps, t) for name, call in methods.items()}

    def check() -> None:
        ours, theirs = (call(x, eps, t) for call in methods.values())
        agree(OURS, ours, theirs, atol=1e-5)

    compare(f"scheduler {method}", x, 12 * x.numel(), candidates, check, seconds=0.7)
