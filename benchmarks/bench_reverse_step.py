"""reverse_step with its noise, into x itself as Sampler calls it."""

from __future__ import annotations

import pytest
import torch
from comparison import COMPILED, compiled, ours
from eager import EagerStep, tuned_step

from ddpm_fast import NoiseSchedule, randn, reverse_step

SCHEDULE = NoiseSchedule.linear()
TABLE = SCHEDULE.step_table(prediction="epsilon", variance="fixed_small")
ROW, T = 500, 499
CHECKED = 16384  # images, at most: in float64 they take a gigabyte


def check(x: torch.Tensor, eps: torch.Tensor, tolerance: float) -> None:
    """Without its noise, our step is the eager mean in float64."""
    x, eps = x[:CHECKED], eps[:CHECKED]
    t = torch.full((x.shape[0],), T, device=x.device)
    mean = EagerStep(SCHEDULE, x.device, torch.float64).mean(x.double(), eps.double(), t)
    ours = reverse_step(x, eps, TABLE, ROW, seed=0, noise=torch.zeros_like(x))
    assert (ours.double() - mean).abs().max() < tolerance
    drawn = reverse_step(x, eps, TABLE, ROW, seed=0).double() - mean
    sigma = SCHEDULE.posterior_variance[T].sqrt()
    assert abs(drawn.std() / sigma - 1) < 5 / (2 * x.numel()) ** 0.5 + tolerance


def bench_float32(compare, size, device):
    x, eps = (randn(size, seed=i, device=device) for i in (1, 2))
    t = torch.full((size[0],), T, device=device)
    eager, tuned = EagerStep(SCHEDULE, device), tuned_step(SCHEDULE, T, x)
    # on the same tensors, which the steps keep bounded
    candidates = ours(lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x), device)
    candidates["eager"] = lambda: eager(x, eps, t)
    candidates["eager, in place by hand"] = lambda: tuned(x, eps)
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        pass
    else:
        scheduler = DDPMScheduler()
        timestep = torch.tensor(T)
        candidates["diffusers"] = lambda: scheduler.step(eps, timestep, x)
    if len(x) in COMPILED[device.type]:
        whole = compiled(eager)
        candidates["torch.compile"] = lambda: whole(x, eps, t)
    compare(
        "reverse_step float32", x.numel(), 12 * x.numel(), candidates, lambda: check(x, eps, 1e-5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def bench_low_precision(compare, size, dtype, device):
    """Against our own float32 step, and eager in the same dtype."""
    x, eps = (randn(size, seed=i, device=device) for i in (1, 2))
    low_x, low_eps = x.to(dtype), eps.to(dtype)
    t = torch.full((size[0],), T, device=device)
    eager = EagerStep(SCHEDULE, device, dtype)
    candidates = ours(lambda: reverse_step(low_x, low_eps, TABLE, ROW, seed=1, out=low_x), device)
    candidates["our float32"] = lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x)
    candidates["eager"] = lambda: eager(low_x, low_eps, t)
    if device.type == "cuda" and len(x) in COMPILED["cuda"]:
        whole = compiled(eager)
        candidates["torch.compile"] = lambda: whole(low_x, low_eps, t)
    name = f"reverse_step {str(dtype).removeprefix('torch.')}"
    compare(name, x.numel(), 6 * x.numel(), candidates, lambda: check(low_x, low_eps, 0.05))


VARIANTS = ["channels_last", "guidance", "learned_range", "x0 output", "bfloat16 model"]


@pytest.mark.parametrize("variant", VARIANTS)
def bench_variants(compare, large_size, variant, device):
    """What each variant costs over the plain step."""
    x, eps, uncond = (randn(large_size, seed=i, device=device) for i in range(3))
    plain_x, table, kwargs, moved = x.clone(), TABLE, {}, 12
    if variant == "channels_last":
        x, eps = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, eps))
    elif variant == "guidance":
        kwargs, moved = {"model_output_uncond": uncond, "guidance_scale": 2.0}, 16
    elif variant == "learned_range":
        table = SCHEDULE.step_table(prediction="epsilon", variance="learned_range")
        eps, moved = torch.cat([eps, uncond.tanh()], 1), 16
    elif variant == "bfloat16 model":  # its input written beside the state
        eps = eps.bfloat16()
        kwargs = {"out_lowp": torch.empty_like(eps)}
    else:
        kwargs, moved = {"return_x0": True}, 16
    plain_eps = randn(large_size, seed=1, device=device)
    candidates = ours(lambda: reverse_step(x, eps, table, ROW, seed=1, out=x, **kwargs), device)
    candidates["our plain step"] = lambda: reverse_step(
        plain_x, plain_eps, TABLE, ROW, seed=1, out=plain_x
    )

    def as_on_the_cpu() -> None:
        few = {k: v[:64].cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        expected = reverse_step(x[:64].cpu(), eps[:64].cpu(), table, ROW, seed=1, **few)
        some = {k: v[:64] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        found = reverse_step(x[:64], eps[:64], table, ROW, seed=1, **some)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        assert torch.equal(found.cpu(), expected)
        assert found.isfinite().all()

    compare(f"reverse_step {variant}", x.numel(), moved * x.numel(), candidates, as_on_the_cpu)
