"""How group_norm_silu's three kernels are called: what lies where, in how many chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import DTYPES, kernel_of, select, triton_launcher
from . import checks
from . import group_norm_silu_formulas as formulas
from .group_norm_silu_formulas import Affine

# Elements of a chunk: they stay in the first-level cache between the passes that go over them.
CPU_CHUNK = 4096
# Pixels of one in channels_last, at most: they are added up one after the other.
CPU_CHUNK_PIXELS = 64
# Pixels of a chunk of the backward pass, in channels_last, where they are added up one after the
# other, and else.
CPU_SUMS_CHUNK = {True: 32, False: 16384}


def cpu_chunks(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A chunk's length, how many there are, and floats of scratch, for the CPU's forward kernel:
    pixels of a sample and moments of channels in channels_last, else of whole groups.

    >>> cpu_chunks((8, 128, 32, 32, 32, True)), cpu_chunks((8, 128, 32, 32, 32, False))
    ((32, 32, 65536), (4096, 1, 512))
    """
    samples, channels, groups, rows, cols, channels_last = shape
    chunk, length, each = CPU_CHUNK, channels // groups * rows * cols, groups
    if channels_last:
        chunk = min(max(CPU_CHUNK // channels, 1), CPU_CHUNK_PIXELS)
        length, each = rows * cols, channels
    chunks = -(-length // chunk)
    return chunk, chunks, samples * chunks * 2 * each


def cpu_sums_chunks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Pixels of a chunk, and chunks of a sample, for the CPU's kernels of the backward pass."""
    *_, rows, cols, channels_last = shape
    chunk = CPU_SUMS_CHUNK[bool(channels_last)]
    return chunk, -(-rows * cols // chunk)


def cuda_chunks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Pixels of a chunk, and chunks of a sample, for the CUDA kernels, whose moments and sums are
    of single channels: few pixels where a chunk has all channels, so that blocks are many.

    >>> cuda_chunks((1, 128, 32, 32, 32, True)), cuda_chunks((1, 128, 32, 256, 256, False))
    ((32, 32), (1024, 64))
    """
    pixels, chunk = shape[3] * shape[4], 32 if shape[5] else 1024
    while (chunk < 128 and pixels > 64 * chunk) or pixels > 512 * chunk:
        chunk *= 2
    return chunk, -(-pixels // chunk)


Strides = tuple[int, int, int]  # from sample to sample, row to row, pixel to pixel


def lies_channels_last(tensor: Tensor) -> bool:
    """Whether it is read as it lies, channels side by side; if not, as contiguous."""
    if tensor.is_contiguous():
        return False
    if tensor.ndim == 4:
        return tensor.stride(1) == 1 or tensor.shape[1] == 1
    return checks.is_channels_last(tensor)


def as_read(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor itself where a kernel can read it as it lies, else a copy."""
    if channels_last and tensor.ndim == 4 and (tensor.stride(1) == 1 or tensor.shape[1] == 1):
        return tensor
    return checks.laid_out(tensor, channels_last)


def pixel_strides(tensor: Tensor | None, channels_last: bool) -> Strides:
    if tensor is None or not channels_last:
        return (0, 0, 0)
    if tensor.ndim == 4:
        return tensor.stride(0), tensor.stride(2), tensor.stride(3)
    return tensor.stride(0), tensor.stride(3), tensor.stride(4)  # dense: depth and height are rows


def shape_of(x: Tensor, num_groups: int, channels_last: bool) -> tuple[int, ...]:
    """GroupNormShape's fields in csrc/core/group_norm_silu.h."""
    samples, channels, *sides = x.shape
    cols = sides[-1] if len(sides) > 1 else 1
    rows = 1
    for side in sides[:-1] if len(sides) > 1 else sides:
        rows *= side
    return samples, channels, num_groups, rows, cols, channels_last


def run_forward(
    x: Tensor,
    num_groups: int,
    affine: Affine,
    eps: float,
    residual: Tensor | None,
    silu: bool,
    y: Tensor,
    sum_out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Writes y, and where they are given s = x + residual and the statistics [N, groups]."""
    backend = select(x.device)
    if y.numel() == 0:
        for statistic in (mean, rstd):
            if statistic is not None:
                statistic.zero_()
        return
    if backend == "reference":
        formulas.forward(
            x, num_groups, affine.as_read(), eps, residual, silu, y, sum_out, mean, rstd
        )
        return
    channels_last = not y.is_contiguous()
    x = as_read(x, channels_last)
    residual = None if residual is None else as_read(residual, channels_last)
    affine = affine.as_read()
    if backend == "triton":  # which cuts a sample, and makes room for that, by itself
        triton_launcher("group_norm_silu", x.device)(
            x, residual, sum_out, y, channels_last, num_groups, affine, eps, silu, mean, rstd
        )
        return
    shape = shape_of(x, num_groups, channels_last)
    samples, channels = shape[:2]
    if backend == "cuda":
        chunk, chunks = cuda_chunks(shape)
        floats = samples * channels * (2 * chunks + 3)
    else:
        chunk, chunks, floats = cpu_chunks(shape)
    scratch = torch.empty(floats, dtype=torch.float32, device=x.device)
    run, where = kernel_of("group_norm_silu", backend, x.device)
    run(
        x.data_ptr(),
        *pixel_strides(x, channels_last),
        checks.address(residual),
        *pixel_strides(residual, channels_last),
        checks.address(sum_out),
        *pixel_strides(sum_out, channels_last),
        y.data_ptr(),
        *pixel_strides(y, channels_last),
        DTYPES[x.dtype],
        *shape,
        *affine.addresses(),
        eps,
        silu,
        checks.address(mean),
        checks.address(rstd),
        scratch.data_ptr(),
        chunk,
        chunks,
        *where,
    )


def run_sums(
    dy: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, silu: bool, sums: Tensor
) -> None:
    """Σ dz, Σ dz·x̂ and Σ x̂ of each channel of a sample, [3, N, C]."""
    if s.numel() == 0:
        sums.zero_()
        return
    backend = select(s.device)
    if backend == "reference":
        formulas.sums(dy, s, mean, rstd, affine.as_read(), silu, sums)
        return
    channels_last = lies_channels_last(s)
    s, dy = as_read(s, channels_last), checks.laid_out(dy, channels_last)
    affine = affine.as_read()
    if backend == "triton":
        triton_launcher("group_norm_silu_sums", s.device)(
            s, dy, channels_last, affine, silu, mean, rstd, sums
        )
        return
    shape = shape_of(s, mean.shape[1], channels_last)
    samples, channels = shape[:2]
    chunk, chunks = cuda_chunks(shape) if backend == "cuda" else cpu_sums_chunks(shape)
    scratch = torch.empty(samples * chunks * 3 * channels, dtype=torch.float32, device=s.device)
    run, where = kernel_of("group_norm_silu_sums", backend, s.device)
    run(
        s.data_ptr(),
        *pixel_strides(s, channels_last),
        dy.data_ptr(),
        0,
        0,
        DTYPES[s.dtype],
        *shape,
        *affine.addresses(),
        silu,
        mean.data_ptr(),
        rstd.data_ptr(),
        sums.data_ptr(),
        0,
        scratch.data_ptr(),
        chunk,
        chunks,
        *where,
    )


def run_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    silu: bool,
    group_means: Tensor,
    dx: Tensor,
) -> None:
    """rstd (dz·A − m1 − x̂ m2) + dsum, of group_means [2, N, groups], m1 and m2."""
    if s.numel() == 0:
        return
    backend = select(s.device)
    affine = affine.as_read()
    if backend == "reference":
        formulas.bwd(dy, dsum, s, mean, rstd, affine, silu, group_means, dx)
        return
    channels_last = lies_channels_last(s)
    s, dy = as_read(s, channels_last), checks.laid_out(dy, channels_last)
    dsum = None if dsum is None else checks.laid_out(dsum, channels_last)
    if backend == "triton":
        triton_launcher("group_norm_silu_bwd", s.device)(
            s, dy, dsum, dx, channels_last, affine, silu, mean, rstd, group_means
        )
        return
    shape = shape_of(s, mean.shape[1], channels_last)
    chunk, chunks = cuda_chunks(shape) if backend == "cuda" else cpu_sums_chunks(shape)
    run, where = kernel_of("group_norm_silu_bwd", backend, s.device)
    run(
        s.data_ptr(),
        *pixel_strides(s, channels_last),
        dy.data_ptr(),
        checks.address(dsum),
        dx.data_ptr(),
        DTYPES[s.dtype],
        *shape,
        *affine.addresses(),
        silu,
        mean.data_ptr(),
        rstd.data_ptr(),
        0,
        group_means.data_ptr(),
        0,
        chunk,
        chunks,
        *where,
    )
