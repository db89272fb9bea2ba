"""group_norm_silu: y = silu(z (1 + scale) + shift), z = (u - mean) rstd weight + bias, of
u = x + residual + emb, whose mean and rstd are over a sample's groups of channels (Wu & He 2018).

Two kernels, so that a batch of 1 occupies a GPU: the first leaves each chunk's mean and sum of
squares about it in memory, the second combines a group's in their order (Chan et al. 1979) and
writes y. Moves 6 bytes an element in 16 bits, 12 in float32, less what the cache still has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .algebra import silu
from .group_norm_silu_cut import (
    WARPS,
    Affine,
    affine_arguments,
    cut_of_groups,
    layout_of,
    sides_of,
    strides_of,
)
from .group_norm_silu_moments import group_norm_silu_moments_tile_kernel
from .group_norm_silu_tile import (
    affine_of,
    channels_of_piece,
    first_of,
    held_channels,
    held_pixels,
    of_the_tile,
    pixels_of,
    place,
    pointers,
    row_of,
)
from .launch import OPTIONS, SAMPLES_Y
from .tile import field, sample_of


@triton.jit
def combined(moments_ptr, n, group, groups, pixels, chunks, pieces, eps, BLOCKS: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of the tile's groups, and which of them there are."""
    g = tl.arange(0, field(BLOCKS, "room"))
    held = (g < field(BLOCKS, "groups")) & (group + g < groups)
    part, parts = tl.arange(0, field(BLOCKS, "parts")), pieces * chunks
    chunk, piece = part % chunks, part // chunks
    length: tl.constexpr = field(BLOCKS, "tiles") * field(BLOCKS, "pixels")
    of_chunk = tl.minimum(pixels - chunk * length, length)
    count = (of_chunk * channels_of_piece(piece, BLOCKS)).to(tl.float32)
    moments_ptr += (2 * n * groups + group) * parts
    at = moments_ptr + (g * parts)[:, None] + part[None, :]
    mask = held[:, None] & (part < parts)[None, :]
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + groups * parts, mask=mask, other=0.0)
    total = (pixels * field(BLOCKS, "of_group")).to(tl.float32)
    first = tl.load(moments_ptr + g * parts, mask=held, other=0.0)  # near which rounding is finer
    off = tl.where(mask, (means - first[:, None]) * count[None, :], 0.0)
    mean = first + tl.div_rn(tl.sum(off, 1), total)
    delta = means - mean[:, None]
    squares += delta * count[None, :] * delta
    variance = tl.div_rn(tl.sum(tl.where(mask, squares, 0.0), 1), total)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), held


@triton.jit
def to_channels(of_groups, of_group, BLOCKS: tl.constexpr):
    """What a tile's groups have for each of their channels: sums of one number and zeros."""
    if field(BLOCKS, "groups") == 1:
        return tl.sum(of_groups, 0)
    else:
        return tl.sum(tl.where(of_group, of_groups[:, None], 0.0), 0)


@triton.jit(
    do_not_specialize=[
        "s_sample", "s_row", "s_pixel", "y_sample", "y_row", "y_pixel", "emb_stride",
        "scale_stride", "shift_stride", "samples", "groups", "pixels", "columns", "chunks",
        "pieces",
    ],
    do_not_specialize_on_alignment=[
        "weight_ptr", "bias_ptr", "emb_ptr", "scale_ptr", "shift_ptr",
        "moments_ptr", "mean_ptr", "rstd_ptr",
    ],
)  # fmt: skip
def group_norm_silu_tile_kernel(
    s_ptr,  # [samples, channels, pixels], at the strides that follow: x + residual
    s_sample: tl.int64,
    s_row: tl.int64,
    s_pixel: tl.int64,
    y_ptr,  # the same; may be s
    y_sample: tl.int64,
    y_row: tl.int64,
    y_pixel: tl.int64,
    weight_ptr,  # float32 [channels] or None
    bias_ptr,
    emb_ptr,  # float32 [samples or 1, channels] or None
    emb_stride: tl.int64,
    scale_ptr,
    scale_stride: tl.int64,
    shift_ptr,
    shift_stride: tl.int64,
    moments_ptr,  # as the first kernel leaves them
    mean_ptr,  # float32 [samples, groups] or None
    rstd_ptr,
    eps: tl.float32,
    samples: tl.int64,
    groups: tl.int32,
    pixels: tl.int64,
    columns: tl.int64,
    chunks: tl.int32,
    pieces: tl.int32,
    SILU: tl.constexpr,
    SAMPLES_Y: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    n = sample_of(SAMPLES_Y)
    if n >= samples:
        return
    chunk, channel_tile = place(chunks, BLOCKS)
    group, piece, first = first_of(channel_tile, pieces, BLOCKS)
    held, of_group = of_the_tile(piece, BLOCKS)
    held &= held_channels(first, groups * field(BLOCKS, "of_group"), BLOCKS)
    mean, rstd, is_group = combined(
        moments_ptr, n, group, groups, pixels, chunks, pieces, eps, BLOCKS
    )
    if mean_ptr is not None:
        g = n * groups + group + tl.arange(0, field(BLOCKS, "room"))
        is_first = is_group & (chunk == 0) & (piece == 0)
        tl.store(mean_ptr + g, mean, mask=is_first)
        tl.store(rstd_ptr + g, rstd, mask=is_first)
    c = first + tl.arange(0, field(BLOCKS, "channels"))
    slope, offset = affine_of(
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        n,
        scale_stride,
        shift_stride,
        c,
        held,
        BLOCKS,
    )
    slope *= to_channels(rstd, of_group, BLOCKS)
    emb = row_of(emb_ptr, n, emb_stride, c, held, 0.0, BLOCKS)
    centre = to_channels(mean, of_group, BLOCKS) - emb
    for i in range(field(BLOCKS, "tiles")):
        pixel = pixels_of(chunk, i, BLOCKS)
        mask = held_pixels(pixel, pixels, BLOCKS)[:, None] & held[None, :]
        at_s = pointers(s_ptr, n, first, pixel, pixels, columns, s_sample, s_row, s_pixel, BLOCKS)
        s = tl.load(at_s, mask=mask, other=0.0).to(tl.float32)
        z = tl.fma(s - centre[None, :], slope[None, :], offset[None, :])
        if SILU:
            z = silu(z)
        at_y = pointers(y_ptr, n, first, pixel, pixels, columns, y_sample, y_row, y_pixel, BLOCKS)
        tl.store(at_y, z.to(y_ptr.dtype.element_ty), mask=mask)


def launch_group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    sum_out: Tensor | None,
    y: Tensor,
    channels_last: bool,
    num_groups: int,
    affine: Affine,
    eps: float,
    silu: bool,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fills ``y``, with residual ``sum_out``, and where they are given ``mean`` and ``rstd``.
    affine: weight, bias, emb, scale and shift, float32, channels side by side."""
    if y.numel() == 0:
        return
    samples, channels = x.shape[:2]
    pixels, columns = sides_of(x)
    shape = (channels, num_groups, pixels, channels_last, x.itemsize)
    inputs = (x, residual, sum_out)
    cut = cut_of_groups(*shape, *layout_of(inputs, affine, channels_last))
    moments = torch.empty(
        samples * 2 * num_groups * cut.pieces * cut.chunks, dtype=torch.float32, device=x.device
    )
    sizes = (samples, num_groups, pixels, columns, cut.chunks, cut.pieces)
    of_tensors = [arg for t in inputs for arg in (t, *strides_of(t, channels_last))]
    group_norm_silu_moments_tile_kernel[cut.grid(samples)](
        *of_tensors,
        *affine_arguments(affine)[2:4],
        moments,
        *sizes,
        SAMPLES_Y,
        cut.blocks,
        num_warps=WARPS,
        **OPTIONS,
    )
    s = x if sum_out is None else sum_out
    cut = cut_of_groups(*shape, *layout_of((s, y), affine, channels_last))
    group_norm_silu_tile_kernel[cut.grid(samples)](
        s,
        *strides_of(s, channels_last),
        y,
        *strides_of(y, channels_last),
        *affine_arguments(affine),
        moments,
        mean,
        rstd,
        eps,
        *sizes,
        silu,
        SAMPLES_Y,
        cut.blocks,
        num_warps=WARPS,
        **OPTIONS,
    )
