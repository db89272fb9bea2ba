"""Trajectories on a GPU, captured and not: the network of google/ddpm-cifar10-32, random weights in
bfloat16, against diffusers' loop (or, where it is not installed, the same in plain PyTorch), the
same with the network compiled with max-autotune, and an eager loop that is captured by hand. How
many steps a graph are best; what part of a step no kernel runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from bench_sampling import SCHEDULE, PeerSteps, compile_
from eager import EagerStep
from results import OURS
from torch import Tensor

from ddpm_fast import Sampler, UNet, UNetConfig, randn
from ddpm_fast.capture import graphs

STEPS = 64  # of the thousand, from the last ones: a whole trajectory of the slowest takes minutes
FIRST = len(SCHEDULE) - STEPS


@pytest.fixture(scope="module")
def model(device: torch.device) -> UNet:
    if device.type != "cuda":
        pytest.skip("graphs are captured on CUDA devices: --device cuda")
    torch.manual_seed(0)
    unet = UNet(UNetConfig()).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return unet.to(device, torch.bfloat16)


class CapturedEager:
    """A step of PyTorch's own operations in a graph: what a person would capture by hand."""

    def __init__(self, unet: UNet, count: int) -> None:
        device = unet.conv_in.weight.device
        step = EagerStep(SCHEDULE, device, unet.dtype)
        self.x = torch.randn(count, 3, 32, 32, device=device, dtype=unet.dtype)
        self.t = torch.full((count,), STEPS - 1, device=device)
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
        self.t.fill_(STEPS - 1)
        for _ in range(STEPS):
            self._graph.replay()


def many(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def ours(unet: UNet, count: int, **options: object) -> Callable[[], Tensor]:
    device = unet.conv_in.weight.device
    sampler = Sampler(unet, SCHEDULE, device=device, **options)
    x = randn([count, 3, 32, 32], seed=0, device=device)
    return lambda: sampler.sample(x.shape, x_T=x, start=FIRST)


def in_turn(candidates: dict[str, Callable[[], object]], seconds: float) -> list[dict[str, float]]:
    """Seconds a step of each, round after round; two calls before set things up."""

    def timed(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS

    with torch.inference_mode():
        for call in candidates.values():
            call()
            call()
        rounds = []
        deadline = time.perf_counter() + seconds
        while len(rounds) < 5 or time.perf_counter() < deadline:
            rounds.append({name: timed(call) for name, call in candidates.items()})
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
    captured, loop = ours(model, count), ours(model, count, graph="off")
    captured()
    torch.testing.assert_close(captured(), loop(), rtol=0, atol=0)
    peer = "diffusers"
    try:
        theirs = model.to_diffusers()
    except ImportError:
        theirs, peer = model, "eager"
    candidates: dict[str, Callable[[], object]] = {
        OURS: captured,
        f"{OURS} step by step": loop,
        peer: many(PeerSteps(theirs, model, count, False)),
        "max-autotune": many(PeerSteps(compile_(theirs), model, count, False)),
        "eager, captured by hand": CapturedEager(model, count),
    }
    rounds = in_turn(candidates, 5.0 if request.config.getoption("--quick") else 20.0)
    whole = sorted(r[OURS] for r in rounds)[len(rounds) // 2]
    outside = 1 - kernel_seconds(captured) / STEPS / whole
    record(
        f"a captured step, batch {count}",
        3072 * count,
        rounds,
        percent_outside_kernels=round(100 * outside, 1),
    )


@pytest.mark.parametrize("count", [1, 256])
def bench_steps_a_graph(record, model, count, monkeypatch):
    """One, four and sixteen steps a graph."""

    def with_steps(steps: int) -> Callable[[], Tensor]:
        sampled = ours(model, count)

        def call() -> Tensor:
            monkeypatch.setattr(graphs, "STEPS", steps)
            return sampled()

        return call

    candidates = {OURS if n == 1 else f"{n} a graph": with_steps(n) for n in (1, 4, 16)}
    expected = candidates[OURS]()
    for name, call in candidates.items():
        torch.testing.assert_close(call(), expected, rtol=0, atol=0, msg=name)
    record(f"steps a graph, batch {count}", 3072 * count, in_turn(candidates, 10.0))
