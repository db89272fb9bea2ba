"""A step of sampling, UNet and reverse step, of the network of google/ddpm-cifar10-32 with random
weights, against diffusers' UNet2DModel and scheduler; and what each rewrite of the plan brings,
with its error."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from bench_sample import flops_of
from comparison import compiled_network, short_of_memory
from correctness import within
from eager import EagerStep
from peers import Maybe, Missing, diffusers
from results import OURS
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, prepare
from ddpm_fast.engine import REWRITES

SCHEDULE = NoiseSchedule.linear()
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BATCHES = {"cpu": [1, 8, 32], "cuda": [1, 256]}
T = (1, 400, 950)  # where errors are taken
# In which order they join those before; what is missing here changes no speed on its own.
ORDER = (
    "channels_last",
    "time_table",
    "group_norm_silu",
    "phase_upsample",
    "fused_qkv",
    "native_conv",
    "joined_skips",
    "native_attention",
    "winograd",
)


pytestmark = pytest.mark.full  # --quick takes the end-to-end loop of a smaller network


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """count: of images, one a batch."""
    if "count" in metafunc.fixturenames:
        metafunc.parametrize("count", BATCHES[metafunc.config.getoption("--device")])


@pytest.fixture(scope="module")
def model(device: torch.device) -> UNet:
    """With weights whose outputs, and whose norms, are as large as trained ones'."""
    why = short_of_memory(device, 6_000_000_000)
    if why:
        pytest.skip(f"{why}: the network of google/ddpm-cifar10-32")
    generator = torch.Generator().manual_seed(0)
    unet = UNet(UNetConfig()).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return unet.to(device, DTYPES[device.type])


@pytest.fixture(scope="module")
def exact(model: UNet) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, t, output) of the whole network in float64."""
    generator = torch.Generator().manual_seed(1)
    device = model.conv_in.weight.device
    double = UNet(model.config).to(device, torch.float64).eval()
    double.load_state_dict(model.state_dict())
    found = []
    for t in T:
        x = torch.randn(2, 3, 32, 32, generator=generator).to(device, model.dtype)
        steps = torch.full((2,), t, device=device)
        with torch.no_grad():
            found.append((x, steps, double(x.double(), steps)))
    return found


def eager_error(model: UNet, exact: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Of the model itself, in both layouts: PyTorch's kernels for either differ."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {"eager": error(model, exact), "eager, channels_last": error(last, exact)}


def error(function: Callable[..., Tensor], exact: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The largest ||y - y64|| / ||y64|| over t."""
    with torch.inference_mode():
        return max(((function(x, t) - y).norm() / y.norm()).item() for x, t, y in exact)


def resized(
    exact: list[tuple[Tensor, Tensor, Tensor]], count: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """In batches of ``count``, which is what a peer's network may have been compiled for."""
    which = torch.arange(count) % 2
    return [(x[which], t[which], y[which]) for x, t, y in exact]


class OurSteps:
    """Steps of a Sampler, trajectory after trajectory."""

    def __init__(self, model: UNet, count: int, **options: Any) -> None:
        device = model.conv_in.weight.device
        self.sampler = Sampler(model, SCHEDULE, variance="fixed_large", device=device, **options)
        self.shape, self.steps = [count, 3, 32, 32], iter(())

    def __call__(self) -> None:
        if next(self.steps, None) is None:
            self.steps: Iterator[Any] = self.sampler.stream(self.shape)
            next(self.steps)


class PeerSteps:
    """Steps as the field writes them around a module: diffusers' scheduler, or where it is not
    installed, the same in plain PyTorch."""

    def __init__(
        self, module: Callable[..., Any], like: UNet, count: int, channels_last: bool
    ) -> None:
        device = like.conv_in.weight.device
        self.module = module
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.x = torch.randn(count, 3, 32, 32).to(device, like.dtype, memory_format=self.format)
        self.timesteps = torch.arange(len(SCHEDULE) - 1, 0, -1, device=device).tolist()
        self.row = 0
        package = diffusers()
        if isinstance(package, Missing):
            eager = EagerStep(SCHEDULE, device, like.dtype)
            self.step = lambda eps, t, x: eager(x, eps, torch.full((count,), t, device=device))
        else:
            scheduler = package.DDPMScheduler(variance_type="fixed_large")
            self.step = lambda eps, t, x: scheduler.step(eps, t, x).prev_sample

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.module(x.contiguous(memory_format=self.format), t)
        return getattr(output, "sample", output)

    def __call__(self) -> None:
        t = self.timesteps[self.row]
        self.row = (self.row + 1) % len(self.timesteps)
        eps = self.network(self.x, torch.full((len(self.x),), t, device=self.x.device))
        self.x = self.step(eps, t, self.x).contiguous(memory_format=self.format)


def peers(model: UNet, count: int, quick: bool = False) -> dict[str, PeerSteps | Missing]:
    """diffusers' network, or where it is not installed, the same of this package as it stands: in
    both layouts, eager and compiled."""
    missing = isinstance(diffusers(), Missing)
    theirs = copy.deepcopy(model) if missing else model.to_diffusers()
    name = "eager" if missing else "diffusers"
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    found: dict[str, PeerSteps | Missing] = {
        name: PeerSteps(theirs, model, count, False),
        f"{name}, channels_last": PeerSteps(last, model, count, True),
    }
    if missing:
        found["diffusers"] = diffusers()
    on_gpu = model.conv_in.weight.is_cuda
    if not quick and not on_gpu and count == 1:  # of more, no faster
        found["torch.compile"] = stepping(compiled_network(theirs), model, count, False)
    if not quick or on_gpu:
        found["torch.compile, channels_last"] = stepping(compiled_network(last), model, count, True)
    return found


def stepping(whole: Maybe, model: UNet, count: int, channels_last: bool) -> PeerSteps | Missing:
    return whole if isinstance(whole, Missing) else PeerSteps(whole, model, count, channels_last)


def in_turn(
    candidates: dict[str, Callable[[], None]], device: torch.device, seconds: float, steps: int
) -> list[dict[str, float]]:
    """Seconds a step of each, round after round; two steps before the first set things up."""

    def timed(step: Callable[[], None]) -> float:
        step()  # pays for the caches that the candidate before it left
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    with torch.inference_mode():
        for step in candidates.values():
            step()
            step()
        rounds, names = [], list(candidates)
        deadline = time.perf_counter() + seconds
        while len(rounds) < 5 or time.perf_counter() < deadline:
            times = {name: timed(candidates[name]) for name in names}
            rounds.append({name: times[name] for name in candidates})
            names.append(names.pop(0))  # none always follows the same
    return rounds


def bench_step(record, model, exact, device, count):
    eager = eager_error(model, exact)
    allowed, least = 2 * eager["eager"], 2 * max(eager.values())
    state = torch.empty(count, 3, 32, 32, device="meta", dtype=model.dtype)
    case = f"sampling step, batch {count}"
    plans = {OURS: prepare(model), f"{OURS}, exact": prepare(model, without=["winograd"])}
    errors = {name: error(plan, exact) for name, plan in plans.items()}
    candidates: dict[str, Any] = {
        name: OurSteps(model, count, plan=plan) for name, plan in plans.items()
    }
    with torch._inductor.config.patch(freezing=device.type == "cpu"):
        others = record.running(peers(model, count))
        with record.checking(case, state):
            for name, found in errors.items():
                within(name, found, allowed)
            for name, peer in others.items():
                within(name, error(peer.network, resized(exact, count)), least)
        rounds = in_turn(candidates | others, device, 12.0, max(8 // count, 1))
    flops = flops_of(model, (count, 3, 32, 32))
    record(case, state, rounds, flops=flops, relative_error=errors | eager)


@pytest.mark.parametrize("images", [1, 8])
def bench_rewrites(record, model, exact, device, images):
    """From none to all, each beside those before it."""
    assert set(ORDER) == set(REWRITES)
    plans = {"none": prepare(model, rewrites=())}
    for i, name in enumerate(ORDER[:-1], 1):
        plan = prepare(model, rewrites=ORDER[:i])
        if name in plan.rewrites:
            plans[f"+ {name}"] = plan
    plans[OURS] = prepare(model)
    errors = {name: error(plan, exact) for name, plan in plans.items()}
    eager = eager_error(model, exact)
    state = torch.empty(images, 3, 32, 32, device="meta", dtype=model.dtype)
    case = f"rewrites, batch {images}"
    with record.checking(case, state, op="rewrites"):
        within(OURS, errors[OURS], 2 * eager["eager"])
        within("rewrites", max(errors.values()), 2 * max(eager.values()))
    candidates: dict[str, Callable[[], None]] = {
        name: OurSteps(model, images, plan=plan) for name, plan in plans.items()
    }
    candidates["eager"] = OurSteps(model, images, plan="off")
    rounds = in_turn(candidates, device, 10.0, max(8 // images, 1))
    flops = flops_of(model, (images, 3, 32, 32))
    record(case, state, rounds, op="rewrites", flops=flops, relative_error=errors | eager)
    del plans, candidates
    gc.collect()
