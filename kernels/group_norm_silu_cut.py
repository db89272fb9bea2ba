"""How group_norm_silu's samples are cut: a program takes a block of channels and a chunk of pixels,
which it goes through tile by tile.

What is summed is cut by the sample's shape and layout alone: neither the batch nor where in memory
it begins (but for addresses that vectors cannot reach) has a say in the order of additions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import SAMPLES_Y

ELEMENTS = 2048  # of a tile: 16 a thread
WARPS = 4
CHUNKS = 64  # of a sample's pixels, at most, so that adding up what they leave takes no time


@dataclass(frozen=True)
class Blocks:
    """What of it is known when a kernel is compiled."""

    pixels: int  # of a tile
    channels: int  # of a tile; both powers of 2
    tiles: int  # of a chunk
    vector: int  # elements side by side, at addresses that are multiples of it
    channels_last: bool
    rows: bool  # between which there are gaps
    aligned: bool  # whether rows of channels are, to 16 bytes
    groups: int = 0  # of a tile; 1 where it holds one or a part of one, 0 where they do not matter
    of_group: int = 0  # channels
    parts: int = 1  # room for all that a group is combined of, a power of 2

    @property
    def tile(self) -> int:
        """Elements of one."""
        return self.pixels * self.channels

    @property
    def room(self) -> int:
        """For the groups of a tile."""
        return power_of_2(self.groups)

    @property
    def step(self) -> int:
        """Of which every tile's first channel is a multiple."""
        if self.groups > 1:
            return self.groups * self.of_group
        return math.gcd(self.of_group, self.channels)  # of 0 and channels, channels

    @property
    def vector_of_channels(self) -> int:
        return math.gcd(self.vector, self.step)


@dataclass(frozen=True)
class Cut:
    """Of a sample, into programs."""

    blocks: Blocks
    chunks: int
    channel_tiles: int
    pieces: int  # of a group

    def grid(self, samples: int) -> tuple[int, int, int]:
        return (
            self.chunks * self.channel_tiles, min(samples, SAMPLES_Y), -(-samples // SAMPLES_Y),
        )  # fmt: skip


def power_of_2(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def even(total: int, least: int, most: int) -> int:
    """The largest power of 2 up to most whose blocks reach at most an eighth of total past it, or
    least where only smaller ones do."""
    block = min(power_of_2(total), most)
    while block > least and -total % block * 8 > total:
        block //= 2
    return block


@functools.lru_cache(maxsize=1024)
def cut_of_groups(
    channels: int,
    groups: int,
    pixels: int,
    channels_last: bool,
    itemsize: int,
    rows: bool,
    aligned: bool,
    vector: int,
) -> Cut:
    """Where each group's elements are brought together: a tile of several whole groups, of one, or
    of a piece of one. Of what chunks leave, a program reads an eighth as much as of elements."""
    of_group = channels // groups
    together = 1
    if channels_last:
        block = even(of_group, 16, 64)
        if of_group <= 64:
            together, block = whole_groups(of_group, groups, 16 // itemsize)
        of_tile = max(ELEMENTS // block, 1)
        of_tile = min(power_of_2(pixels), of_tile)
    else:
        of_tile = even(pixels, 128, ELEMENTS)
        block = even(of_group, 4, ELEMENTS // of_tile)
    pieces = -(-of_group // block)
    share, tiles = (block if together == 1 else of_group), 1
    while (chunks := -(-pixels // (of_tile * tiles))) > 1 and chunks * pieces > min(
        CHUNKS, share * of_tile * tiles // 16
    ):
        tiles *= 2
    blocks = Blocks(
        of_tile, block, tiles, vector, channels_last, rows, aligned, together, of_group,
        power_of_2(pieces * chunks),
    )  # fmt: skip
    return Cut(blocks, chunks, -(-groups // together) * pieces, pieces)


def whole_groups(of_group: int, groups: int, vector: int) -> tuple[int, int]:
    """How many groups a tile of how many channels holds, so that tiles begin where vectors do and
    few lanes are without work."""
    step, channels = 1, of_group * groups
    while step * of_group % math.gcd(channels, vector) and 2 * step * of_group <= 128:
        step *= 2
    found = (0.0, 0, 0)
    for most in (64, 128):
        block = min(most, power_of_2(channels))
        together = min(block // of_group, groups)
        if together * of_group < channels and together > step:
            together -= together % step
        of_all = -(-groups // together) * block
        found = max(found, (channels / of_all, -block, together))
    return found[2], -found[1]


@functools.lru_cache(maxsize=1024)
def cut_of_channels(
    channels: int, pixels: int, channels_last: bool, rows: bool, aligned: bool, vector: int
) -> Cut:
    """Where groups do not matter."""
    if channels_last:
        block = even(channels, 16, 64)
        of_tile = min(power_of_2(pixels), ELEMENTS // block)
    else:
        of_tile = even(pixels, 128, ELEMENTS)
        block = even(channels, 4, ELEMENTS // of_tile)
    tiles = power_of_2(-(-pixels // (of_tile * 16)))
    chunks = -(-pixels // (of_tile * tiles))
    blocks = Blocks(
        of_tile, block, tiles, vector, channels_last, rows, aligned, parts=power_of_2(chunks)
    )  # fmt: skip
    return Cut(blocks, chunks, -(-channels // block), 1)


# weight and bias [channels]; emb, scale and shift [samples or 1, channels]: float32, channels side
# by side.
Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Strides = tuple[int, int, int]  # from sample to sample, row to row, pixel to pixel


def strides_of(tensor: Tensor | None, channels_last: bool) -> Strides:
    if tensor is None:
        return (0, 0, 0)
    if not channels_last:
        return (tensor.stride(0), 0, 1)
    return (tensor.stride(0), tensor.stride(-2), tensor.stride(-1))


def affine_arguments(affine: Affine) -> list[Tensor | int | None]:
    """Each tensor, the last three with their strides from sample to sample, 0 where all share."""
    weight, bias, *of_samples = affine
    found: list[Tensor | int | None] = [weight, bias]
    for tensor in of_samples:
        shared = tensor is None or tensor.shape[0] == 1
        found += [tensor, 0 if shared else tensor.stride(0)]
    return found


def sides_of(x: Tensor) -> tuple[int, int]:
    """Pixels, and pixels of a row."""
    samples, channels = x.shape[:2]
    return x.numel() // (samples * channels), x.shape[-1] if x.ndim > 2 else 1


def layout_of(
    tensors: Sequence[Tensor | None], affine: Affine, channels_last: bool
) -> tuple[bool, bool, int]:
    """Whether rows have gaps, whether rows of channels are aligned, and the elements of a vector:
    16 bytes, or what all can do."""
    present = [tensor for tensor in tensors if tensor is not None]
    channels, (pixels, columns) = present[0].shape[1], sides_of(present[0])
    rows, together = False, channels if channels_last else pixels
    for tensor in present:
        sample, row, pixel = strides_of(tensor, channels_last)
        together |= sample | tensor.data_ptr() // tensor.itemsize
        if channels_last:
            together |= row | pixel
            rows |= pixels > columns and row != columns * pixel
    aligned = channels % 4 == 0 and all(
        t is None or (t.data_ptr() % 16 == 0 and (t.ndim == 1 or t.stride(0) % 4 == 0))
        for t in affine
    )
    whole = 16 // present[0].itemsize
    vector = min(together & -together, whole)
    if torch.version.hip is not None and vector < whole:
        vector = 1  # or parts of a batch would be read in other vectors than all of it
    return rows, aligned, vector
