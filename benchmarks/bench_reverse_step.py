"""reverse_step with its noise, into x itself as Sampler calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import COMPILED, REFERENCE, compiled, on_reference, ours
from correctness import agree, like_randn
from eager import EagerStep, tuned_step
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
from torch import Tensor

from ddpm_fast import NoiseSchedule, randn, reverse_step

SCHEDULE = NoiseSchedule.linear()
TABLE = SCHEDULE.step_table(prediction="epsilon", variance="fixed_small")
ROW, T = 500, 499
SCALE = 2.0  # of guidance
CHECKED = 16384  # images, at most: in float64 they take a gigabyte


def first(result: Any) -> Tensor:
    """The state, of what the systems return."""
    if hasattr(result, "prev_sample"):
        return result.prev_sample
    if isinstance(result, dict):
        return result["sample"]
    return result[0] if isinstance(result, tuple) else result


Rule = Callable[[str, Callable[[], Any]], None]


def rule_of(
    x: Tensor,
    eps: Tensor,
    tolerance: float,
    v: Tensor | None = None,
    x0: bool = False,
    lowp: Tensor | None = None,
) -> Rule:
    """Ours is the eager mean in float64 and addressed noise, rounded once to x's dtype; of the
    others, which may be off by ``tolerance``, the noise is their own, and what is not mean has to
    be like it. ``eps``: guided, in any dtype. ``x``: written to, and ``lowp`` besides."""
    units = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    before = x.clone()
    few, said = x[:CHECKED].double(), eps[:CHECKED].double()
    t = torch.full((len(few),), T, device=x.device)
    step = EagerStep(SCHEDULE, x.device, torch.float64)
    mean, predicted = step.mean(few, said, t), step.x0(few, said, t)
    sigma = step.std(few, t, None if v is None else v[:CHECKED].double())
    z = randn(few.shape, seed=1, stream=1, index=T, device=x.device).double()

    def rule(name: str, call: Callable[[], Any]) -> None:
        x.copy_(before)
        result = call()
        found = first(result)[:CHECKED].double()
        if name.startswith((OURS, "our ")) or name == "reference":
            agree(name, found, mean + sigma * z, atol=1e-5, rtol=units)
            if x0:
                agree(f"{name}, x0", result[1][:CHECKED], predicted, atol=1e-5, rtol=units)
            if lowp is not None:
                agree(f"{name}, the model's input", lowp, x.to(lowp.dtype))
        else:
            like_randn(name, (found - mean) / sigma, 10 * tolerance / float(sigma.min()))
        x.copy_(before)

    return rule


def rules(main: Rule, others: dict[str, Rule]) -> Rule:
    """Of candidates that step another state, their own."""
    return lambda name, call: others.get(name, main)(name, call)


def from_diffusers(x: Tensor, said: Callable[[], Tensor], **config: Any) -> Maybe:
    package = diffusers()
    if isinstance(package, Missing):
        return package
    scheduler, timestep = package.DDPMScheduler(**config), torch.tensor(T)
    return lambda: scheduler.step(said(), timestep, x)


def from_lucidrains(x: Tensor, eps: Tensor) -> Maybe:
    theirs = lucidrains_diffusion(Given(eps), x.shape[-1], x.device)
    return theirs if isinstance(theirs, Missing) else lambda: theirs.p_sample(x, T)


def from_openai(x: Tensor, output: Tensor, t: Tensor, variance: str) -> Callable[[], Any]:
    theirs = openai_diffusion(variance)
    return lambda: theirs.p_sample(lambda *_: output, x, t)


def bench_float32(compare, size, device):
    x, eps = (randn(size, seed=i, device=device) for i in (1, 2))
    t = torch.full((size[0],), T, device=device)
    eager, tuned = EagerStep(SCHEDULE, device), tuned_step(SCHEDULE, T, x)
    # on the same tensors, which the steps keep bounded
    candidates = ours(lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x), device)
    candidates["eager"] = lambda: eager(x, eps, t)
    candidates["eager, in place by hand"] = lambda: tuned(x, eps)
    if len(x) in COMPILED[device.type]:
        candidates["torch.compile"] = calling(compiled(eager, device.type), x, eps, t)
    candidates["diffusers"] = from_diffusers(x, lambda: eps)
    candidates["lucidrains"] = from_lucidrains(x, eps)
    candidates["OpenAI"] = from_openai(x, eps, t, "FIXED_SMALL")
    if len(x) <= REFERENCE[device.type]:
        candidates["reference"] = on_reference(candidates[OURS])
    compare("reverse_step float32", x, 12 * x.numel(), candidates, rule=rule_of(x, eps, 1e-5))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)],
    ids=["bfloat16", "float16"],
)
def bench_low_precision(compare, size, dtype, device, quick):
    """Against our own float32 step, and others in the same dtype."""
    x, eps = (randn(size, seed=i, device=device) for i in (1, 2))
    low_x, low_eps = x.to(dtype), eps.to(dtype)
    t = torch.full((size[0],), T, device=device)
    eager = EagerStep(SCHEDULE, device, dtype)
    candidates = ours(lambda: reverse_step(low_x, low_eps, TABLE, ROW, seed=1, out=low_x), device)
    candidates["our float32"] = lambda: reverse_step(x, eps, TABLE, ROW, seed=1, out=x)
    candidates["eager"] = lambda: eager(low_x, low_eps, t)
    if not quick and len(x) in COMPILED[device.type]:
        candidates["torch.compile"] = calling(compiled(eager, device.type), low_x, low_eps, t)
    candidates["diffusers"] = from_diffusers(low_x, lambda: low_eps)
    name = f"reverse_step {str(dtype).removeprefix('torch.')}"
    # Theirs rounds after each op.
    rule = rules(rule_of(low_x, low_eps, 0.05), {"our float32": rule_of(x, eps, 1e-5)})
    compare(name, low_x, 6 * x.numel(), candidates, rule=rule)


VARIANTS = ["channels_last", "guidance", "learned_range", "x0 output", "bfloat16 model"]


@pytest.mark.parametrize("variant", VARIANTS)
def bench_variants(compare, large_size, variant, device, quick):
    """What each variant costs over the plain step, and what it costs the others."""
    x, eps, uncond = (randn(large_size, seed=i, device=device) for i in range(3))
    t = torch.full((large_size[0],), T, device=device)
    plain_x, table, kwargs, moved, v, lowp = x.clone(), TABLE, {}, 12, None, None
    eager, said, config = EagerStep(SCHEDULE, device), eps, {}
    whole, arguments = eager.__call__, (x, eps, t)
    if variant == "channels_last":
        x, eps = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, eps))
        said, arguments = eps, (x, eps, t)
    elif variant == "guidance":
        kwargs, moved = {"model_output_uncond": uncond, "guidance_scale": SCALE}, 16
        said = uncond + SCALE * (eps - uncond)
        whole, arguments = eager.guided, (x, eps, uncond, SCALE, t)
    elif variant == "learned_range":
        table = SCHEDULE.step_table(prediction="epsilon", variance="learned_range")
        v = uncond.tanh()
        eps, moved, config = torch.cat([eps, v], 1), 16, {"variance_type": "learned_range"}
        whole, arguments = eager.learned, (x, eps, t)
    elif variant == "bfloat16 model":  # its input written beside the state
        said = eps = eps.bfloat16()
        lowp = torch.empty_like(eps)
        kwargs = {"out_lowp": lowp}
        whole, arguments = eager.with_model_input, (x, eps, t)
    else:
        kwargs, moved = {"return_x0": True}, 16
        whole, arguments = eager.with_x0, (x, eps, t)
    plain_eps = randn(large_size, seed=1, device=device)
    candidates = ours(lambda: reverse_step(x, eps, table, ROW, seed=1, out=x, **kwargs), device)
    candidates["our plain step"] = lambda: reverse_step(
        plain_x, plain_eps, TABLE, ROW, seed=1, out=plain_x
    )
    candidates["eager"] = calling(whole, *arguments)
    if not quick and variant != "channels_last":
        candidates["torch.compile"] = calling(compiled(whole, device.type), *arguments)
    if variant == "guidance":
        candidates["diffusers"] = from_diffusers(x, lambda: uncond + SCALE * (eps - uncond))
    elif variant == "bfloat16 model":
        candidates["diffusers"] = from_diffusers(x, lambda: eps.float())
    else:
        candidates["diffusers"] = from_diffusers(x, lambda: eps, **config)
    if variant == "learned_range":
        candidates["OpenAI"] = from_openai(x, eps, t, "LEARNED_RANGE")
    rule = rules(
        rule_of(x, said, 1e-5, v, variant == "x0 output", lowp),
        {"our plain step": rule_of(plain_x, plain_eps, 1e-5)},
    )
    compare(f"reverse_step {variant}", x, moved * x.numel(), candidates, rule=rule)
