"""The acceptance rule of every kernel, and tensors to try it on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ddpm_fast import randn

ISAS = ["avx512", "avx2", "portable"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (3, 3),
    (2, 1023),
    (2, 3, 5, 7),
    (1, 3, 32, 32),
    (3, 4, 16, 16),
    (2, 5, 67, 41),
    (2, 3, 2, 3, 5),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
]
LAYOUTS = ["contiguous", "channels_last", "strided"]

_MEMORY_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


# Contract version 1. A change of this hash is a new version, and needs a new number in the docs.
FROZEN_SHAPE, FROZEN_SEED = (6, 3, 251, 257), 0x0123456789ABCDEF
FROZEN_HASH = "453c395f8f9948d8fda953aca6784e568b34f5779f613e649aa1e075ee36d790"


def frozen_block(device: str = "cpu") -> Tensor:
    """1,161,126 values: odd sizes, large ids, a stream and an index that are not 0."""
    ids = [0, 1, 2**31, 2**32 + 5, 2**40, 2**63 - 1]
    address = {"seed": FROZEN_SEED, "sample_ids": ids, "stream": 131, "index": 777}
    return randn(FROZEN_SHAPE, **address, device=device)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().astype("<f4").tobytes()).hexdigest()


def no_gpu() -> bool:
    return not torch.cuda.is_available()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; as they are where the layout does not apply."""
    if layout == "channels_last" and tensor.ndim in _MEMORY_FORMAT:
        return tensor.contiguous(memory_format=_MEMORY_FORMAT[tensor.ndim])
    if layout == "strided":  # every second element of a larger tensor, poisoned in between
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan).to(tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor.contiguous()


def poisoned_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output to fill: NaN, so that an element that is not written shows."""
    return torch.full_like(tensor, torch.nan, dtype=dtype)


def ulp(dtype: torch.dtype) -> float:
    """Of values in [1, 2)."""
    return torch.finfo(dtype).eps


def assert_as_good_as_eager(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of eager PyTorch in the same dtype, plus one ulp."""
    assert result.shape == exact.shape
    assert not result.isnan().any()
    if exact.numel() == 0:
        return
    error = (result.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    allowed += ulp(result.dtype) * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
