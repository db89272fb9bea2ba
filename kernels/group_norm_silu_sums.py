"""group_norm_silu_sums: of each sample's channels the sums over pixels that its gradient follows
from, S1 = sum dz, S2 = sum dz xhat, S3 = sum xhat, dz = dy silu'(z). Reads 4 bytes an element in 16
bits, 8 in float32. Each chunk of pixels leaves its sums in memory, a second kernel adds them up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .algebra import silu_derivative
from .group_norm_silu_cut import (
    WARPS,
    Affine,
    affine_arguments,
    cut_of_channels,
    layout_of,
    sides_of,
    strides_of,
)
from .group_norm_silu_tile import (
    affine_of,
    held_channels,
    held_pixels,
    of_groups,
    pixels_of,
    place,
    pointers,
    row_of,
)
from .launch import OPTIONS, SAMPLES_Y
from .sums import SUM_OPTIONS
from .tile import field, sample_of

BLOCK = 32  # channels whose sums a program of the second kernel adds up


@triton.jit
def dz_and_x_hat(dy, s, centre, rstd, slope, offset, SILU: tl.constexpr):
    """Of a tile, given a row of channels of what follows s."""
    x_hat = (s - centre[None, :]) * rstd[None, :]
    if SILU:
        dy *= silu_derivative(tl.fma(x_hat, slope[None, :], offset[None, :]))
    return dy, x_hat


@triton.jit(
    do_not_specialize=[
        "s_sample", "s_row", "s_pixel", "dy_sample", "dy_row", "dy_pixel", "emb_stride",
        "scale_stride", "shift_stride", "samples", "channels", "groups", "pixels", "columns",
        "chunks",
    ],
    do_not_specialize_on_alignment=[
        "weight_ptr", "bias_ptr", "emb_ptr", "scale_ptr", "shift_ptr",
        "mean_ptr", "rstd_ptr", "shares_ptr",
    ],
)  # fmt: skip
def group_norm_silu_sums_tile_kernel(
    s_ptr,  # [samples, channels, pixels], at the strides that follow
    s_sample: tl.int64,
    s_row: tl.int64,
    s_pixel: tl.int64,
    dy_ptr,  # the same
    dy_sample: tl.int64,
    dy_row: tl.int64,
    dy_pixel: tl.int64,
    weight_ptr,  # float32 [channels] or None
    bias_ptr,
    emb_ptr,  # float32 [samples or 1, channels] or None
    emb_stride: tl.int64,
    scale_ptr,
    scale_stride: tl.int64,
    shift_ptr,
    shift_stride: tl.int64,
    mean_ptr,  # float32 [samples, groups]
    rstd_ptr,
    shares_ptr,  # float32 [samples, chunks, 3, channels]
    samples: tl.int64,
    channels: tl.int32,
    groups: tl.int32,
    pixels: tl.int64,
    columns: tl.int64,
    chunks: tl.int32,
    SILU: tl.constexpr,
    SAMPLES_Y: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    n = sample_of(SAMPLES_Y)
    if n >= samples:
        return
    chunk, channel_tile = place(chunks, BLOCKS)
    first = channel_tile * field(BLOCKS, "channels")
    held = held_channels(first, channels, BLOCKS)
    c = first + tl.arange(0, field(BLOCKS, "channels"))
    rstd = of_groups(rstd_ptr, n, groups, c, channels, held)
    centre = of_groups(mean_ptr, n, groups, c, channels, held)
    centre -= row_of(emb_ptr, n, emb_stride, c, held, 0.0, BLOCKS)
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
    of_dz = tl.zeros([field(BLOCKS, "pixels"), field(BLOCKS, "channels")], tl.float32)
    of_both, of_x_hat = tl.zeros_like(of_dz), tl.zeros_like(of_dz)
    for i in range(field(BLOCKS, "tiles")):
        pixel = pixels_of(chunk, i, BLOCKS)
        mask = held_pixels(pixel, pixels, BLOCKS)[:, None] & held[None, :]
        at_s = pointers(s_ptr, n, first, pixel, pixels, columns, s_sample, s_row, s_pixel, BLOCKS)
        at_dy = pointers(
            dy_ptr, n, first, pixel, pixels, columns, dy_sample, dy_row, dy_pixel, BLOCKS
        )  # fmt: skip
        s = tl.load(at_s, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(at_dy, mask=mask, other=0.0).to(tl.float32)
        dz, x_hat = dz_and_x_hat(dy, s, centre, rstd, slope, offset, SILU)
        x_hat = tl.where(mask, x_hat, 0.0)
        of_dz += dz
        of_both = tl.fma(dz, x_hat, of_both)
        of_x_hat += x_hat
    shares_ptr += (n * chunks + chunk) * 3 * channels + c
    tl.store(shares_ptr, tl.sum(of_dz, 0), mask=held)
    tl.store(shares_ptr + channels, tl.sum(of_both, 0), mask=held)
    tl.store(shares_ptr + 2 * channels, tl.sum(of_x_hat, 0), mask=held)


@triton.jit(
    do_not_specialize=["samples", "channels", "chunks"],
    do_not_specialize_on_alignment=["shares_ptr", "sums_ptr"],
)
def group_norm_silu_sums_sum_tile_kernel(
    shares_ptr,  # float32 [samples, chunks, 3, channels]
    sums_ptr,  # float32 [3, samples, channels]
    samples: tl.int64,
    channels: tl.int32,
    chunks: tl.int32,
    SAMPLES_Y: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = sample_of(SAMPLES_Y)
    if n >= samples:
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of a sample's 3 x channels
    chunk = tl.arange(0, CHUNKS).to(tl.int64)
    held = i < 3 * channels
    at = shares_ptr + (n * chunks + chunk)[:, None] * (3 * channels) + i[None, :]
    mask = (chunk < chunks)[:, None] & held[None, :]
    total = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    tl.store(sums_ptr + ((i // channels * samples + n) * channels + i % channels), total, mask=held)


def launch_group_norm_silu_sums(
    s: Tensor,
    dy: Tensor,
    channels_last: bool,
    affine: Affine,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
) -> None:
    """Fills ``sums``, float32 [3, samples, channels]. s is x + residual."""
    samples, channels = s.shape[:2]
    pixels, columns = sides_of(s)
    cut = cut_of_channels(
        channels, pixels, channels_last, *layout_of((s, dy), affine, channels_last)
    )
    shares = torch.empty(samples * cut.chunks * 3 * channels, dtype=torch.float32, device=s.device)
    group_norm_silu_sums_tile_kernel[cut.grid(samples)](
        s,
        *strides_of(s, channels_last),
        dy,
        *strides_of(dy, channels_last),
        *affine_arguments(affine),
        mean,
        rstd,
        shares,
        samples,
        channels,
        mean.shape[1],
        pixels,
        columns,
        cut.chunks,
        silu,
        SAMPLES_Y,
        cut.blocks,
        num_warps=WARPS,
        **OPTIONS,
    )
    _, of_samples, beyond = cut.grid(samples)
    group_norm_silu_sums_sum_tile_kernel[(-(-3 * channels // BLOCK), of_samples, beyond)](
        shares, sums, samples, channels, cut.chunks, SAMPLES_Y, cut.blocks.parts, BLOCK,
        **SUM_OPTIONS,
    )  # fmt: skip
