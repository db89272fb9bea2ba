"""The first kernel of group_norm_silu: of each chunk the mean and the sum of squares about it, of
each group; and x + residual. Reads 2 bytes an element in 16 bits, 4 in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_tile import (
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
from .tile import field, sample_of


@triton.jit(
    do_not_specialize=[
        "x_sample", "x_row", "x_pixel", "residual_sample", "residual_row", "residual_pixel",
        "sum_sample", "sum_row", "sum_pixel", "emb_stride", "samples", "groups", "pixels",
        "columns", "chunks", "pieces",
    ],
    do_not_specialize_on_alignment=[
        "emb_ptr", "moments_ptr",
    ],
)  # fmt: skip
def group_norm_silu_moments_tile_kernel(
    x_ptr,  # [samples, channels, pixels], at the strides that follow
    x_sample: tl.int64,
    x_row: tl.int64,
    x_pixel: tl.int64,
    residual_ptr,  # the same, or None
    residual_sample: tl.int64,
    residual_row: tl.int64,
    residual_pixel: tl.int64,
    sum_ptr,  # the same: x + residual; None without residual
    sum_sample: tl.int64,
    sum_row: tl.int64,
    sum_pixel: tl.int64,
    emb_ptr,  # float32 [samples or 1, channels] or None
    emb_stride: tl.int64,
    moments_ptr,  # float32 [samples, 2, groups, pieces * chunks]: means, sums of squares about them
    samples: tl.int64,
    groups: tl.int32,
    pixels: tl.int64,
    columns: tl.int64,
    chunks: tl.int32,
    pieces: tl.int32,
    SAMPLES_Y: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    n = sample_of(SAMPLES_Y)
    if n >= samples:
        return
    chunk, channel_tile = place(chunks, BLOCKS)
    PIXELS: tl.constexpr = field(BLOCKS, "pixels")
    group, piece, first = first_of(channel_tile, pieces, BLOCKS)
    held, of_group = of_the_tile(piece, BLOCKS)
    held &= held_channels(first, groups * field(BLOCKS, "of_group"), BLOCKS)
    c = first + tl.arange(0, field(BLOCKS, "channels"))
    emb = row_of(emb_ptr, n, emb_stride, c, held, 0.0, BLOCKS)
    # Welford's recurrence at each place of a tile, from tile to tile; between places at the end.
    count = tl.zeros([PIXELS], tl.float32)
    means = tl.zeros([PIXELS, field(BLOCKS, "channels")], tl.float32)
    squares = tl.zeros_like(means)
    tiles = tl.full([], 0.0, tl.float32)
    for i in range(field(BLOCKS, "tiles")):
        pixel = pixels_of(chunk, i, BLOCKS)
        is_pixel = held_pixels(pixel, pixels, BLOCKS)
        mask = is_pixel[:, None] & held[None, :]
        at_x = pointers(
            x_ptr, n, first, pixel, pixels, columns, x_sample, x_row, x_pixel, BLOCKS
        )  # fmt: skip
        u = tl.load(at_x, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            at_residual = pointers(
                residual_ptr, n, first, pixel, pixels, columns, residual_sample, residual_row,
                residual_pixel, BLOCKS,
            )  # fmt: skip
            u += tl.load(at_residual, mask=mask, other=0.0).to(tl.float32)
            s = u.to(sum_ptr.dtype.element_ty)
            at_sum = pointers(
                sum_ptr, n, first, pixel, pixels, columns, sum_sample, sum_row, sum_pixel, BLOCKS
            )
            tl.store(at_sum, s, mask=mask)
            u = s.to(tl.float32)
        if emb_ptr is not None:
            u += emb[None, :]
        delta = tl.where(mask, u - means, 0.0)
        count += is_pixel.to(tl.float32)
        tiles += 1.0
        means += delta * tl.div_rn(1.0, tiles)
        squares = tl.fma(delta, u - means, squares)
    counted = tl.sum(count, 0)
    mean = tl.div_rn(tl.sum(means * count[:, None], 0), counted)
    delta = means - mean[None, :]
    squares = tl.sum(squares + delta * count[:, None] * delta, 0)
    # From channels to their groups, all of whose channels have as many pixels.
    channels = channels_of_piece(piece, BLOCKS).to(tl.float32)
    group_mean = tl.sum(tl.where(of_group, mean[None, :], 0.0), 1)
    group_mean = tl.div_rn(group_mean, channels)
    delta = tl.where(of_group, mean[None, :] - group_mean[:, None], 0.0)
    group_squares = tl.sum(tl.where(of_group, squares[None, :], 0.0), 1)
    group_squares += counted * tl.sum(delta * delta, 1)
    g = tl.arange(0, field(BLOCKS, "room"))
    parts = pieces * chunks
    moments_ptr += (2 * n * groups + group) * parts + piece * chunks + chunk
    mask = (g < field(BLOCKS, "groups")) & (group + g < groups)
    tl.store(moments_ptr + g * parts, group_mean, mask=mask)
    tl.store(moments_ptr + (groups + g) * parts, group_squares, mask=mask)
