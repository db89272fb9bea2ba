"""randn against torch.randn, each returning a new tensor."""

from __future__ import annotations

import pytest
import torch
from comparison import ours
from results import OURS

from ddpm_fast import randn


def check(shape: tuple[int, ...], device: torch.device) -> None:
    """The bits of the CPU, of the first images; the moments of all."""
    few = (min(shape[0], 64), *shape[1:])
    assert torch.equal(randn(few, seed=1, device=device).cpu(), randn(few, seed=1))
    z = randn(shape, seed=1, device=device)
    assert abs(z.mean(dtype=torch.float64)) < 5 / z.numel() ** 0.5
    assert abs(z.square().mean(dtype=torch.float64) - 1) < 5 * (2 / z.numel()) ** 0.5


def bench_float32(compare, size, device):
    elements = torch.Size(size).numel()
    candidates = ours(lambda: randn(size, seed=1, device=device), device)
    candidates["torch.randn"] = lambda: torch.randn(size, device=device)
    compare("randn float32", elements, 4 * elements, candidates, lambda: check(size, device))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_layouts(compare, large_size, dtype, layout, device):
    elements = torch.Size(large_size).numel()
    format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    kwargs = {"dtype": dtype, "device": device}
    candidates = {
        OURS: lambda: randn(large_size, seed=1, memory_format=format_, **kwargs),
        "torch.randn": lambda: torch.randn(large_size, **kwargs),
    }
    name = f"randn {str(dtype).removeprefix('torch.')} {layout}"
    nbytes = dtype.itemsize * elements
    compare(name, elements, nbytes, candidates, lambda: check(large_size, device))
