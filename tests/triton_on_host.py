"""Triton's interpreter with a GPU's arithmetic, so that its bits are those of every backend.

By itself it rounds the product of a fused multiply-add, and cuts float32 off to bfloat16.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_fast import reference
from ddpm_fast.kernels import support


def needs_interpreter() -> None:
    if not support.interpreted():
        pytest.skip(support.triton_problem() or "there is a GPU, and Triton compiles")


def lend_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter both operations, until the test ends."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def create_fma(self, x, y, z):
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32 arrays, rounded once."""
    total = x.astype(np.float64) * y + z
    # Rounding float64 to float32 is rounding twice where the first came to a tie, and below the
    # normal numbers, where ties lie elsewhere.
    tie = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if tie.any() or (np.abs(total) < 2.0**-126).any():
        return reference.fma(*(torch.from_numpy(np.array(v)) for v in (x, y, z))).numpy()
    return total.astype(np.float32)
