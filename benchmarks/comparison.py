"""How candidates are timed, and the sizes that the cases share."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

OURS = "ddpm_fast"

# 3,072, 49,152, 786,432 and 3,145,728 elements.
SIZES = pytest.mark.parametrize("size", [1, 16, 256, 1024], indirect=True)


def device_name() -> str:
    """The processor and the number of threads in use."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def medians(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds a call: each candidate in turn, in blocks of 5 calls and 0.2 ms or more, until time
    is up. Of single calls, each would pay for the caches that the candidate before it left."""
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
