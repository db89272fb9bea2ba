"""group_norm_silu_bwd: dx = rstd (dz weight (1 + scale) - m1 - xhat m2) + dsum, dz = dy silu'(z),
m1 and m2 the means that group_norm_silu_sums leads to. Moves 6 bytes an element in 16 bits, 12 in
float32, with dsum a half more."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu_cut import (
    WARPS,
    Affine,
    affine_arguments,
    cut_of_channels,
    layout_of,
    sides_of,
    strides_of,
)
from .group_norm_silu_sums import dz_and_x_hat
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
from .tile import field, sample_of


@triton.jit(
    do_not_specialize=[
        "s_sample", "s_row", "s_pixel", "dy_sample", "dy_row", "dy_pixel", "dsum_sample",
        "dsum_row", "dsum_pixel", "dx_sample", "dx_row", "dx_pixel", "emb_stride", "scale_stride",
        "shift_stride", "samples", "channels", "groups", "pixels", "columns", "chunks",
    ],
    do_not_specialize_on_alignment=[
        "weight_ptr", "bias_ptr", "emb_ptr", "scale_ptr",
        "shift_ptr", "mean_ptr", "rstd_ptr", "group_means_ptr",
    ],
)  # fmt: skip
def group_norm_silu_bwd_tile_kernel(
    s_ptr,  # [samples, channels, pixels], at the strides that follow
    s_sample: tl.int64,
    s_row: tl.int64,
    s_pixel: tl.int64,
    dy_ptr,  # the same
    dy_sample: tl.int64,
    dy_row: tl.int64,
    dy_pixel: tl.int64,
    dsum_ptr,  # the same: what else comes back to s; or None
    dsum_sample: tl.int64,
    dsum_row: tl.int64,
    dsum_pixel: tl.int64,
    dx_ptr,  # the same
    dx_sample: tl.int64,
    dx_row: tl.int64,
    dx_pixel: tl.int64,
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
    group_means_ptr,  # float32 [2, samples, groups]: m1, m2
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
    m1 = of_groups(group_means_ptr, n, groups, c, channels, held)
    m2 = of_groups(group_means_ptr, samples + n, groups, c, channels, held)
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
        dx = tl.fma(dz, slope[None, :], -m1[None, :])
        dx = rstd[None, :] * tl.fma(-x_hat, m2[None, :], dx)
        if dsum_ptr is not None:
            at_dsum = pointers(
                dsum_ptr, n, first, pixel, pixels, columns, dsum_sample, dsum_row, dsum_pixel,
                BLOCKS,
            )  # fmt: skip
            dx += tl.load(at_dsum, mask=mask, other=0.0).to(tl.float32)
        at_dx = pointers(
            dx_ptr, n, first, pixel, pixels, columns, dx_sample, dx_row, dx_pixel, BLOCKS
        )  # fmt: skip
        tl.store(at_dx, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launch_group_norm_silu_bwd(
    s: Tensor,
    dy: Tensor,
    dsum: Tensor | None,
    dx: Tensor,
    channels_last: bool,
    affine: Affine,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
    group_means: Tensor,
) -> None:
    """Fills ``dx``. group_means: m1 and m2, float32 [2, samples, groups]."""
    samples, channels = s.shape[:2]
    pixels, columns = sides_of(s)
    tensors = (s, dy, dsum, dx)
    cut = cut_of_channels(
        channels, pixels, channels_last, *layout_of(tensors, affine, channels_last)
    )
    group_norm_silu_bwd_tile_kernel[cut.grid(samples)](
        *[argument for t in tensors for argument in (t, *strides_of(t, channels_last))],
        *affine_arguments(affine),
        mean,
        rstd,
        group_means,
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
