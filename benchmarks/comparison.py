"""How candidates are timed, and the sizes that the cases share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from peers import Maybe, Missing
from results import OURS
from torch import nn

from ddpm_fast import backends, use_backend

# Images of 3 x 32 x 32, from one to what fills several caches, or several gigabytes.
SIZES = {"cpu": [1, 16, 256, 1024], "cuda": [1, 16, 256, 4096, 65536, 262144]}
QUICK_SIZES = {"cpu": [16, 256], "cuda": [1, 256, 65536]}
LARGE = {"cpu": 256, "cuda": 65536}
COMPILED = {"cpu": [256], "cuda": [65536, 262144]}  # a compilation takes seconds
REFERENCE = {"cpu": 16, "cuda": 256}  # at most: its noise takes hundreds of full-size ops

Candidates = dict[str, Callable[[], object] | Missing]
Running = dict[str, Callable[[], object]]


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def preferring(name: str) -> Iterator[None]:
    """Tensors on a GPU go to one backend, those on the host where they always go."""
    module = importlib.import_module("ddpm_fast.backends")
    before = module._ON_GPUS
    module._ON_GPUS = {name: before[name]} if name in before else before
    try:
        yield
    finally:
        module._ON_GPUS = before


def ours(call: Callable[[], object], device: torch.device) -> Candidates:
    """The call on the backend that is taken by itself, and on each further one for a GPU."""
    candidates = {OURS: call}
    if device.type == "cuda":
        running = [name for name in ("cuda", "triton") if backends()[name].available]
        for name in running[1:]:

            def on(name=name) -> object:
                with preferring(name):
                    return call()

            candidates[f"{OURS} {name}"] = on
    return candidates


def on_reference(call: Callable[[], object]) -> Callable[[], object]:
    """The same call of the package's specification in plain PyTorch, addressed noise included."""

    def run() -> object:
        with use_backend("reference"):
            return call()

    return run


@functools.cache
def why_not_compiled(device_type: str) -> str:
    """Why torch.compile has nothing to compile with; "" if it has."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile: no Triton for this GPU"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # whatever it finds wrong
        return f"torch.compile: no C++ compiler ({type(error).__name__})"
    return ""


def compiled(
    call: Callable[..., object], device_type: str = "cpu", **options: Any
) -> Callable[..., object] | Missing:
    """torch.compile of it for the shapes at hand. All callable objects count as one function, which
    is compiled eight times and then runs as it is, with a warning: not here. On a CPU its noise is
    PyTorch's: Inductor's own is drawn number by number, and takes tens of times as long."""
    why = why_not_compiled(device_type)
    if why:
        return Missing(why)
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device_type == "cpu":
        options.setdefault("options", {"fallback_random": True})
    return torch.compile(call, dynamic=False, **options)


def compiled_network(module: nn.Module) -> Maybe:
    """As fast as PyTorch makes it: on a GPU by trying everything, on a CPU as it is, for which
    whoever calls it first may freeze the weights."""
    device_type = next(module.parameters()).device.type
    mode = {"mode": "max-autotune"} if device_type == "cuda" else {}
    return compiled(module, device_type, **mode)


def free_memory(device: torch.device) -> int:
    """Bytes that a case may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = [1 << 62]
    if os.path.exists("/proc/meminfo"):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        free += [1024 * int(found[1])] if found else []
    group = Path("/sys/fs/cgroup")  # of a container
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        free.append(limit - used + (int(cache[1]) if cache else 0))
    return min(free)


def short_of_memory(device: torch.device, nbytes: int) -> str:
    """Why a case that takes so much is left out; "" if it is not."""
    if nbytes <= free_memory(device):
        return ""
    return f"less than {nbytes / 1e9:.2g} GB of memory free"


def medians(candidates: Running, seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds a call, each candidate in turn until time is up."""
    if device.type == "cuda":
        return device_medians(candidates, seconds)
    return host_medians(candidates, seconds)


def host_medians(candidates: Running, seconds: float) -> dict[str, float]:
    """By the clock, in blocks of 5 calls and 0.2 ms or more, of one call where that takes long,
    after one that does not count: it pays for the caches and the allocator's memory that the
    candidate before it left."""
    batches = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        took = max(time.perf_counter() - start, 1e-7)
        batches[name] = max(5, int(2e-4 / took)) if took < 5e-3 else 1
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 5:
        for name, call in candidates.items():
            count = batches[name]
            call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in samples.items()}


def device_medians(candidates: Running, seconds: float) -> dict[str, float]:
    """By events on the GPU, one call at a time. Before each, memory four times the second-level
    cache is written, so that the call finds nothing of its own there, and the GPU is kept busy for
    another millisecond, until the host has queued the call: what is measured is the GPU's time."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flushed = torch.empty(max(4 * properties.L2_cache_size, 2**28), dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    torch.cuda.synchronize()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 10:
        events = {}
        for name, call in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(2_000_000)  # cycles
            start.record()
            call()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def whole_calls(
    candidates: Running, device: torch.device, seconds: float, least: int
) -> list[dict[str, float]]:
    """Seconds of calls that take long enough to be timed alone, round after round."""

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds, names = [], list(candidates)
    deadline = time.perf_counter() + seconds
    while len(rounds) < least or time.perf_counter() < deadline:
        times = {name: timed(candidates[name]) for name in names}
        rounds.append({name: times[name] for name in candidates})
        names.append(names.pop(0))  # none always follows the same
    return rounds
