"""reverse_step with its noise, into x itself as Sampler calls it."""

from __future__ import annotations

import pytest
import torch
from comparison import OURS, SIZES
from eager import EagerStep, tuned_step

from ddpm_fast import NoiseSchedule, randn, reverse_step

SCHEDULE = NoiseSchedule.linear()
TABLE = SCHEDULE.step_table(prediction="epsilon", variance="fixed_small")
ROW, T = 500, 499


def check(x: torch.Tensor, eps: torch.Tensor, tolerance: float) -> None:
    """Without its noise, our step is the eager mean in float64."""
    t = torch.full((x.shape[0],), T)
    mean = EagerStep(SCHEDULE, torch.float64).mean(x.double(), eps.double(), t)
    ours = reverse_step(x, eps, TABLE, ROW, seed=0, noise=torch.zeros_like(x))
    assert (ours.double() - mean).abs().max() < tolerance
    drawn = reverse_step(x, eps, TABLE, ROW, seed=0).double() - mean
    sigma = SCHEDULE.posterior_variance[T].sqrt()
    assert abs(drawn.std() / sigma - 1) < 5 / (2 * x.numel()) ** 0.5 + tolerance


@SIZES
def bench_float32(compare, size, request):
    x, eps = randn(size, seed=1), randn(size, seed=2)
    t = torch.full((size[0],), T)
    eager, tuned = EagerStep(SCHEDULE), tuned_step(SCHEDULE, T, x)
    candidates = {  # on the same tensors, which the steps keep bounded
        OURS: lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x),
        "eager": lambda: eager(x, eps, t),
        "eager, in place by hand": lambda: tuned(x, eps),
    }
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        pass
    else:
        scheduler = DDPMScheduler()
        timestep = torch.tensor(T)
        candidates["diffusers"] = lambda: scheduler.step(eps, timestep, x)
    if x.numel() == 786_432:
        compiled = torch.compile(eager)
        candidates["torch.compile"] = lambda: compiled(x, eps, t)
    compare(
        "reverse_step float32", x.numel(), 12 * x.numel(), candidates, lambda: check(x, eps, 1e-5)
    )


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def bench_low_precision(compare, size, dtype):
    """Against our own float32 step, and eager in the same dtype."""
    x, eps = randn(size, seed=1), randn(size, seed=2)
    low_x, low_eps = x.to(dtype), eps.to(dtype)
    t = torch.full((size[0],), T)
    eager = EagerStep(SCHEDULE, dtype)
    candidates = {
        OURS: lambda: reverse_step(low_x, low_eps, TABLE, ROW, seed=1, out=low_x),
        "our float32": lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x),
        "eager": lambda: eager(low_x, low_eps, t),
    }
    name = f"reverse_step {str(dtype).removeprefix('torch.')}"
    compare(name, x.numel(), 6 * x.numel(), candidates, lambda: check(low_x, low_eps, 0.05))


@pytest.mark.parametrize("size", [256], indirect=True)
@pytest.mark.parametrize("variant", ["channels_last", "guidance", "learned_range", "x0 output"])
def bench_variants(compare, size, variant):
    """What each variant costs over the plain step."""
    x, eps, uncond = (randn(size, seed=i) for i in range(3))
    plain_x, table, kwargs, moved = x.clone(), TABLE, {}, 12
    if variant == "channels_last":
        x, eps = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, eps))
    elif variant == "guidance":
        kwargs, moved = {"model_output_uncond": uncond, "guidance_scale": 2.0}, 16
    elif variant == "learned_range":
        table = SCHEDULE.step_table(prediction="epsilon", variance="learned_range")
        eps, moved = torch.cat([eps, uncond.tanh()], 1), 16
    else:
        kwargs, moved = {"return_x0": True}, 16
    plain_eps = randn(size, seed=1)
    candidates = {
        OURS: lambda: reverse_step(x, eps, table, ROW, seed=1, out=x, **kwargs),
        "our plain step": lambda: reverse_step(plain_x, plain_eps, TABLE, ROW, seed=1, out=plain_x),
    }

    def finite() -> None:
        assert reverse_step(x, eps, table, ROW, seed=1).isfinite().all()

    compare(f"reverse_step {variant}", x.numel(), moved * x.numel(), candidates, finite)
