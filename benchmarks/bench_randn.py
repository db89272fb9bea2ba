"""randn against torch.randn, each returning a new tensor."""

from __future__ import annotations

import pytest
import torch
from comparison import OURS, SIZES

from ddpm_fast import randn


def check(shape: tuple[int, ...]) -> None:
    z = randn(shape, seed=1).double()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5


@SIZES
def bench_float32(compare, size):
    elements = torch.Size(size).numel()
    candidates = {OURS: lambda: randn(size, seed=1), "torch.randn": lambda: torch.randn(size)}
    compare("randn float32", elements, 4 * elements, candidates, lambda: check(size))


@pytest.mark.parametrize("size", [256], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_layouts(compare, size, dtype, layout):
    elements = torch.Size(size).numel()
    format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    candidates = {
        OURS: lambda: randn(size, seed=1, dtype=dtype, memory_format=format_),
        "torch.randn": lambda: torch.randn(size, dtype=dtype),
    }
    name = f"randn {str(dtype).removeprefix('torch.')} {layout}"
    compare(name, elements, dtype.itemsize * elements, candidates, lambda: check(size))
