"""What a step costs beside its arithmetic on a GPU: the host's time a call, and a step's time in a
captured graph, where nothing lies between two of them. One image of 3 x 32 x 32."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from results import OURS

from ddpm_fast import NoiseSchedule, randn, reverse_step

TABLE = NoiseSchedule.linear().step_table(prediction="epsilon", variance="fixed_small")
SHAPE = (1, 3, 32, 32)
STEPS = 100


def host_time(call: Callable[[], object]) -> Callable[[], object]:
    """Seconds the host takes to queue a call, on a GPU that is busy until all are queued."""

    def queued() -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        return (time.perf_counter() - start) / STEPS

    return queued


def bench_host(gpu, record):
    """The host's time a call, against one elementwise op of torch's."""
    x, eps = (randn(SHAPE, seed=i, device=gpu) for i in (1, 2))
    table = TABLE.to(gpu)
    calls = {
        OURS: lambda: reverse_step(x, eps, table, 500, seed=1, out=x),
        "x.add_(1)": lambda: x.add_(1.0),
        "torch.randn_like": lambda: torch.randn_like(x),
    }
    with torch.inference_mode():
        timers = {name: host_time(call) for name, call in calls.items()}
        rounds = [{name: timer() for name, timer in timers.items()} for _ in range(20)]
    record("host's time a call", x, rounds)


def bench_graph(gpu, record):
    """A step in a graph of a hundred, its row counted on the device, against the same number of
    calls, and of the smallest kernel in such a graph."""
    x, eps = (randn(SHAPE, seed=i, device=gpu) for i in (1, 2))
    table, counter = TABLE.to(gpu), torch.zeros((), dtype=torch.int64, device=gpu)

    def step() -> None:
        reverse_step(x, eps, table, counter, seed=1, out=x)

    def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(STEPS):
                call()
        return graph

    graphs = {OURS: captured(step), "x.add_(1)": captured(lambda: x.add_(1.0))}
    calls = {name: graph.replay for name, graph in graphs.items()}
    calls["plain calls"] = lambda: [step() for _ in range(STEPS)]
    rounds = []
    for _ in range(20):
        seconds = {}
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds[name] = start.elapsed_time(end) / 1e3 / STEPS
        rounds.append(seconds)
    record("reverse_step in a graph", x, rounds)
