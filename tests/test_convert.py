"""bfloat16 and float16 conversions of every code path, bit by bit against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, add_noise

# x_t = 1 · x_0 + 1e-15 · 0: the op as a conversion.
COPY = NoiseSchedule([1e-30])


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zeros = torch.zeros_like(x, dtype=torch.float32)
    return add_noise(x, 0, COPY, seed=0, noise=zeros, dtype=dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_widens_exactly(dtype, isa):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    wide, expected = converted(patterns, torch.float32), patterns.float()
    same = bits(wide) == bits(expected)
    negative_zero = (expected == 0) & (wide == 0)  # −0 · 1 + 0 = +0
    assert bool((same | negative_zero | (wide.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(dtype, isa):
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    scaled = (rng.standard_normal(300_000) * 10.0 ** rng.uniform(-9, 5, 300_000)).astype(np.float32)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    with np.errstate(all="ignore"):
        ties = (patterns + np.nextafter(patterns, np.float32(np.inf))) / 2
        halfway = patterns * np.float32(1 + 2**-9), patterns * np.float32(1 + 2**-12)
    x = torch.from_numpy(np.concatenate([random, scaled, patterns, ties, *halfway]))[None]
    x = x[~x.isnan()][None]
    narrow, expected = converted(x, dtype), x.to(dtype)
    wrong = (bits(narrow) != bits(expected)) & ~((narrow == 0) & (expected == 0))
    assert not wrong.any(), x[wrong][:5]
    not_numbers = torch.full((1, 300), torch.nan)
    assert converted(not_numbers, dtype).isnan().all()
