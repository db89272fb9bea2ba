"""randn: addressable standard normals, z(seed, sample, draw, element). Formula: docs/noise.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import DTYPES, kernel_of, select, triton_launcher
from . import checks

checks.library.define(
    "randn(SymInt[] shape, SymInt seed, Tensor? seeds, Tensor? sample_ids, SymInt stream, "
    "SymInt index, Tensor? indices, ScalarType dtype, Device device, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def randn(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = 0,
    index: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normals, each a pure function of (seed, sample id, stream, index, element).

    Args:
        shape: [N, …], N samples.
        seed: in [0, 2^64), or int64 [N] of 64-bit patterns.
        sample_ids: N non-negative integers; 0 … N−1 if None.
        stream: 0 … 255; 128 to 255 are yours, see docs/noise.md for the others.
        index: 0 … 2^24−1 within the stream, or int64 [N].
        dtype: float32, bfloat16 or float16; the last two are the float32 bits rounded once.
        device: of the result.
        memory_format: of the result; the values do not depend on it.

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError, ValueError: an argument out of its range.

    >>> bool((randn([2, 3], seed=1)[1] == randn([1, 3], seed=1, sample_ids=[1])[0]).all())
    True
    """
    device = checks.indexed(device)
    if isinstance(shape, (int, str)):
        raise TypeError(f"shape must be [N, …]; got {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not be negative; got {list(shape)}")
    checks.check_batch("shape", torch.Size(shape))
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16; got {dtype}")
    seed, seeds, ids = checks.noise_address(seed, sample_ids, shape[0], device)
    stream, index, indices = checks.noise_draw(stream, index, shape[0], device)
    channels_last = _is_channels_last(memory_format, len(shape))
    run_now = device.type != "meta" and checks.runs_now(seeds, ids, indices)
    run = _randn if run_now else torch.ops.ddpm_fast.randn.default
    out: Tensor = run(shape, seed, seeds, ids, stream, index, indices, dtype, device, channels_last)
    return out


def _is_channels_last(memory_format: torch.memory_format, ndim: int) -> bool:
    if memory_format == torch.contiguous_format:
        return False
    expected = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    if expected != ndim:
        raise ValueError(f"memory_format {memory_format} does not fit {ndim} dimensions")
    return True


@torch.library.impl(checks.library, "randn", "CompositeExplicitAutograd")
def _randn(
    shape: Sequence[int],
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> Tensor:
    backend = select(device)
    checks.check_ids_on_host(sample_ids)
    if indices is not None:
        checks.check_range_on_host("index", indices, checks.MAX_INDEX)
    out = checks.empty_laid_out(shape, channels_last, dtype, device)
    if backend == "reference":
        seeds, sample_ids = checks.reference_address(seed, seeds, sample_ids, shape[0], device)
        draws = torch.full_like(sample_ids, index) if indices is None else indices
        return out.copy_(reference.randn(shape, seeds, sample_ids, stream << 24 | draws))
    layout = checks.layout_of(out)
    assert layout is not None
    if backend == "triton":
        launch = triton_launcher("randn", out.device)
        launch(out, layout, seed, seeds, sample_ids, stream, index, indices)
        return out
    run, where = kernel_of("randn", backend, out.device)
    run(
        out.data_ptr(),
        DTYPES[dtype],
        *layout,
        seed,
        checks.address(seeds),
        checks.address(sample_ids),
        stream,
        index,
        checks.address(indices),
        *where,
    )
    return out


@torch.library.register_fake("ddpm_fast::randn", lib=checks.library)
def _randn_fake(
    shape: Sequence[int],
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> Tensor:
    return checks.empty_laid_out(shape, channels_last, dtype, device)
