"""Where the elements of group_norm_silu's programs lie, and what channels are multiplied by. A tile
is [pixels, channels]; in channels_last channels lie side by side, otherwise pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import field


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """The number itself, which the compiler then knows to be a multiple."""
    return number // VECTOR * VECTOR


@triton.jit
def place(chunks, BLOCKS: tl.constexpr):
    """The program's chunk and its tile of channels; neighbours in memory follow each other."""
    program = tl.program_id(0)
    if field(BLOCKS, "channels_last"):
        channel_tiles = tl.num_programs(0) // chunks
        return program // channel_tiles, program % channel_tiles
    else:
        return program % chunks, program // chunks


@triton.jit
def pixels_of(chunk, i, BLOCKS: tl.constexpr):
    """Of a chunk's i-th tile: int64 [pixels]."""
    PIXELS: tl.constexpr = field(BLOCKS, "pixels")
    tile = chunk.to(tl.int64) * field(BLOCKS, "tiles") + i
    return tile * PIXELS + tl.arange(0, PIXELS)


@triton.jit
def pointers(
    ptr, n, first, pixel, pixels, columns, sample, row, step, BLOCKS: tl.constexpr
):  # fmt: skip
    """To a tile whose channels begin at first. sample, row, step: the tensor's strides."""
    VECTOR: tl.constexpr = field(BLOCKS, "vector")
    ITEMSIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    c = tl.arange(0, field(BLOCKS, "channels"))
    ptr += n * multiple(sample, VECTOR)
    # How the last sum is aligned is said for NVIDIA's GPUs, whose compiler forgets what it knows of
    # the others; AMD's makes do with those, and forgets what is said.
    if field(BLOCKS, "channels_last"):
        if field(BLOCKS, "rows"):
            line = pixel // columns
            pixel -= line * columns
            offset = line * multiple(row, VECTOR) + pixel * multiple(step, VECTOR)
        else:
            offset = pixel * multiple(step, VECTOR)
        at = (ptr + first) + offset[:, None] + c[None, :]
        return tl.multiple_of(at, [1, ITEMSIZE * field(BLOCKS, "vector_of_channels")])
    else:
        pixels = multiple(pixels, VECTOR)
        at = (ptr + first * pixels) + (c.to(tl.int64) * pixels)[None, :] + pixel[:, None]
        return tl.multiple_of(at, [ITEMSIZE * VECTOR, 1])


@triton.jit
def held_pixels(pixel, pixels, BLOCKS: tl.constexpr):
    if field(BLOCKS, "channels_last"):
        return pixel < pixels
    else:
        return pixel < multiple(pixels, field(BLOCKS, "vector"))


@triton.jit
def held_channels(first, channels, BLOCKS: tl.constexpr):
    c = tl.arange(0, field(BLOCKS, "channels"))
    if field(BLOCKS, "channels_last"):
        return first + c < multiple(channels, field(BLOCKS, "vector"))
    else:
        return first + c < channels


@triton.jit
def row_of(ptr, n, stride, c, held, otherwise, BLOCKS: tl.constexpr):
    """What a tensor [samples or 1, channels] has for channels, or what holds where there is none"""
    if ptr is None:
        return tl.full(c.shape, otherwise, tl.float32)
    else:
        at = ptr + n * stride + c
        if field(BLOCKS, "aligned") and field(BLOCKS, "step") % 4 == 0:
            at = tl.multiple_of(at, 16)
        return tl.load(at, mask=held, other=0.0)


@triton.jit
def of_groups(ptr, n, groups, c, channels, held):
    """What a tensor [samples, groups] has for channels."""
    return tl.load(ptr + n * groups + c // (channels // groups), mask=held, other=0.0)


@triton.jit
def affine_of(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    n,
    scale_stride,
    shift_stride,
    c,
    held,
    BLOCKS: tl.constexpr,
):
    """weight (1 + scale) and bias (1 + scale) + shift."""
    slope = row_of(weight_ptr, 0, 0, c, held, 1.0, BLOCKS)
    offset = row_of(bias_ptr, 0, 0, c, held, 0.0, BLOCKS)
    if scale_ptr is not None:
        factor = 1.0 + row_of(scale_ptr, n, scale_stride, c, held, 0.0, BLOCKS)
        slope *= factor
        offset *= factor
    if shift_ptr is not None:
        offset += row_of(shift_ptr, n, shift_stride, c, held, 0.0, BLOCKS)
    return slope, offset


@triton.jit
def first_of(channel_tile, pieces, BLOCKS: tl.constexpr):
    """A tile's first group, its piece of that group, and its first channel."""
    if field(BLOCKS, "groups") == 1:
        group, piece = channel_tile // pieces, channel_tile % pieces
        first = group * field(BLOCKS, "of_group") + piece * field(BLOCKS, "channels")
        return group, piece, first
    else:
        TOGETHER: tl.constexpr = field(BLOCKS, "groups")
        group = channel_tile * TOGETHER
        return group, channel_tile * 0, channel_tile * (TOGETHER * field(BLOCKS, "of_group"))


@triton.jit
def of_the_tile(piece, BLOCKS: tl.constexpr):
    """Which of a tile's channels are its groups', and of which: [channels], [groups, channels]."""
    OF_GROUP: tl.constexpr = field(BLOCKS, "of_group")
    GROUPS: tl.constexpr = field(BLOCKS, "room")
    c = tl.arange(0, field(BLOCKS, "channels"))
    if field(BLOCKS, "groups") == 1:
        held = piece * field(BLOCKS, "channels") + c < OF_GROUP
        return held, held[None, :]
    else:
        held = c < field(BLOCKS, "groups") * OF_GROUP
        return held, (c // OF_GROUP)[None, :] == tl.arange(0, GROUPS)[:, None]


@triton.jit
def channels_of_piece(piece, BLOCKS: tl.constexpr):
    """Of one group, in a tile."""
    left = field(BLOCKS, "of_group") - piece * field(BLOCKS, "channels")
    return tl.minimum(left, field(BLOCKS, "channels"))
