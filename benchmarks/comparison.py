"""How candidates are timed, and the sizes that the cases share."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import backends, use_backend

OURS = "ddpm_fast"

# Images of 3 x 32 x 32, from one to what fills several caches, or several gigabytes.
SIZES = {"cpu": [1, 16, 256, 1024], "cuda": [1, 16, 256, 4096, 65536, 262144]}
QUICK_SIZES = {"cpu": [1, 16, 256], "cuda": [1, 256, 65536]}
LARGE = {"cpu": 256, "cuda": 65536}
COMPILED = {"cpu": [256], "cuda": [1, 65536, 262144]}  # a compilation takes seconds

Candidates = dict[str, Callable[[], object]]


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def ours(call: Callable[[], object], device: torch.device) -> Candidates:
    """The call on the backend that is taken by itself, and on each further one for a GPU."""
    candidates = {OURS: call}
    if device.type == "cuda":
        running = [name for name in ("cuda", "triton") if backends()[name].available]
        for name in running[1:]:

            def on(name=name) -> object:
                with use_backend(name):
                    return call()

            candidates[f"{OURS} {name}"] = on
    return candidates


def medians(candidates: Candidates, seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds a call, each candidate in turn until time is up."""
    if device.type == "cuda":
        return device_medians(candidates, seconds)
    return host_medians(candidates, seconds)


def host_medians(candidates: Candidates, seconds: float) -> dict[str, float]:
    """By the clock, in blocks of 5 calls and 0.2 ms or more. Of single calls, each would pay for
    the caches that the candidate before it left."""
    batches = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        batches[name] = max(5, int(2e-4 / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 5:
        for name, call in candidates.items():
            count = batches[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in samples.items()}


def device_medians(candidates: Candidates, seconds: float) -> dict[str, float]:
    """By events on the GPU, one call at a time. Before each, memory four times the second-level
    cache is written: the call finds nothing of its own there, and has been queued, whatever that
    took the host, before the GPU comes to it."""
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
            start.record()
            call()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def table(report: dict[str, Any]) -> Iterator[str]:
    """A report as lines of text."""
    yield f"{report['device']}; torch {report['torch']}; {report['backend']}"
    yield f"copy: {report['copy_gigabytes_per_second']:.1f} GB/s"
    yield f"{'case':<34}{'elements':>10}{'µs':>10}{'GB/s':>8}{'% copy':>8}  slower by"
    for row in report["rows"]:
        moved = [row.get(key) for key in ("gigabytes_per_second", "percent_of_copy")]
        shown = "".join(f"{'' if number is None else f'{number:.1f}':>8}" for number in moved)
        others = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in row["ratio"].items())
        microseconds = row["microseconds"][OURS]
        yield f"{row['case']:<34}{row['elements']:>10}{microseconds:>10.1f}{shown}  {others}"
