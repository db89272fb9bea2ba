"""Trajectories on a GPU, captured and not: the network of google/ddpm-cifar10-32, random weights in
bfloat16, against diffusers' loop (or, where it is not installed, the same in plain PyTorch), the
same with the network compiled with max-autotune, and an eager loop that is captured by hand. How
many steps a graph are best; what part of a step no kernel runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from bench_sampling import SCHEDULE, peers
from correctness import agree
from eager import EagerStep
from results import OURS
from torch import Tensor

from ddpm_fast import Sampler, UNet, UNetConfig, randn
from ddpm_fast.capture import graphs

TAKEN = 64  # steps of the thousand that a call takes, the last ones
# Of the captured: whole trajectories, which bear what their beginnings and ends take, where a step
# is so short that it would count.
WHOLE = {1: len(SCHEDULE), 256: TAKEN}
Candidate = tuple[Callable[[], object], int]  # and how many steps a call takes


@pytest.fixture(scope="module")
def model(gpu: torch.device) -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig()).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return unet.to(gpu, torch.bfloat16)


class CapturedEager:
    """A step of PyTorch's own operations in a graph: what a person would capture by hand."""

    def __init__(self, unet: UNet, count: int, steps: int, channels_last: bool) -> None:
        device = unet.conv_in.weight.device
        layout = torch.channels_last if channels_last else torch.contiguous_format
        unet = copy.deepcopy(unet).to(memory_format=layout)
        step = EagerStep(SCHEDULE, device, unet.dtype)
        x = torch.randn(count, 3, 32, 32, device=device, dtype=unet.dtype)
        self.x = x.contiguous(memory_format=layout)
        self.t = torch.full((count,), steps - 1, device=device)
        self.steps = steps
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())

        def once() -> None:
            self.x.copy_(step(self.x, unet(self.x, self.t), self.t))
            self.t.sub_(1).clamp_(0)

        with torch.no_grad():
            with torch.cuda.stream(side):
                for _ in range(3):
                    once()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                once()

    def __call__(self) -> None:
        self.t.fill_(self.steps - 1)
        for _ in range(self.steps):
            self._graph.replay()


def many(step: Callable[[], None]) -> Candidate:
    def run() -> None:
        for _ in range(TAKEN):
            step()

    return run, TAKEN


def ours(unet: UNet, count: int, steps: int, **options: object) -> Callable[[], Tensor]:
    device = unet.conv_in.weight.device
    sampler = Sampler(unet, SCHEDULE, device=device, **options)
    x = randn([count, 3, 32, 32], seed=0, device=device)
    return lambda: sampler.sample(x.shape, x_T=x, start=len(SCHEDULE) - steps)


def in_turn(candidates: dict[str, Candidate], seconds: float) -> list[dict[str, float]]:
    """Seconds a step of each, round after round; two calls before set things up."""

    def timed(call: Callable[[], object], steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    with torch.inference_mode():
        for call, _ in candidates.values():
            call()
            call()
        rounds, names = [], list(candidates)
        deadline = time.perf_counter() + seconds
        while len(rounds) < 5 or time.perf_counter() < deadline:
            times = {name: timed(*candidates[name]) for name in names}
            rounds.append({name: times[name] for name in candidates})
            names.append(names.pop(0))  # none always follows the same
    return rounds


def kernel_seconds(call: Callable[[], object]) -> float:
    """That kernels and copies run in a call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    spans = [
        event.time_range
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(span.elapsed_us() for span in spans) / 1e6


@pytest.mark.parametrize("count", [1, 256])
def bench_trajectory(record, model, count, request):
    quick, steps = request.config.getoption("--quick"), WHOLE[count]
    loop = ours(model, count, TAKEN, graph="off")
    state = torch.empty(count, 3, 32, 32, device="meta", dtype=model.dtype)
    case = f"a captured step, batch {count}"
    with record.checking(case, state):
        agree(OURS, ours(model, count, TAKEN)(), loop())
    captured = ours(model, count, steps)
    candidates: dict[str, Candidate] = {
        OURS: (captured, steps),
        f"{OURS} step by step": (loop, TAKEN),
        "eager, captured by hand": (CapturedEager(model, count, steps, False), steps),
        "the same, channels_last": (CapturedEager(model, count, steps, True), steps),
    }
    candidates |= {
        name: many(step) for name, step in record.running(peers(model, count, quick)).items()
    }
    rounds = in_turn(candidates, 5.0 if quick else 20.0)
    whole = sorted(r[OURS] for r in rounds)[len(rounds) // 2]
    outside = 1 - kernel_seconds(captured) / steps / whole
    record(case, state, rounds, percent_outside_kernels=round(100 * outside, 1))


@pytest.mark.parametrize("count", [1, 256])
def bench_steps_a_graph(record, model, count, monkeypatch, request):
    """One, four and sixteen steps a graph."""

    def with_steps(steps: int) -> Callable[[], Tensor]:
        sampled = ours(model, count, WHOLE[count])

        def call() -> Tensor:
            monkeypatch.setattr(graphs, "STEPS", steps)
            return sampled()

        return call

    calls = {OURS if n == 1 else f"{n} a graph": with_steps(n) for n in (1, 4, 16)}
    state = torch.empty(count, 3, 32, 32, device="meta", dtype=model.dtype)
    case, expected = f"steps a graph, batch {count}", calls[OURS]()
    with record.checking(case, state):
        for name, call in calls.items():
            agree(name, call(), expected)
    candidates = {name: (call, WHOLE[count]) for name, call in calls.items()}
    seconds = 3.0 if request.config.getoption("--quick") else 10.0
    record(case, state, in_turn(candidates, seconds))
