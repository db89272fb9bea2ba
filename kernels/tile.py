"""Where a program's elements lie, how they are read and written, and which noise is theirs.

A program takes one tile of one sample: ``lanes`` lanes, each of one or more vectors of ``vector``
elements that lie side by side in memory.

* channels = 1: a contiguous sample, whose elements in memory order are elements in noise order.
* channels = 2 to 4: that many channels in channels_last. A lane takes ``pixels`` whole pixels, in
  memory whole vectors, and of each channel pixels / 4 Philox blocks.
* channels = 0: whatever does not come in whole vectors. A lane takes one Philox block, its four
  elements wherever they lie.

The values of a tile are a tuple of vectors, float32 [lanes * vector] in memory order. Between them
and the tensors [lanes] in which noise is drawn, registers are renamed and nothing moves.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .noise import normals


@dataclass(frozen=True)
class Tiling:
    """What of it is known when a kernel is compiled; launch.cut() chooses."""

    channels: int
    pixels: int
    vector: int
    lanes: int
    channels_last: bool  # where channels is 0

    @property
    def vectors(self) -> int:
        """Of a lane."""
        return max(self.channels, 1) * self.pixels // self.vector

    @property
    def tile(self) -> int:
        """Elements."""
        return self.lanes * self.vectors * self.vector


@triton.constexpr_function
def field(tiling, name):
    return getattr(tiling, name)


@triton.constexpr_function
def in_blocks(tiling, lanes):
    """Of the same sample, into tiles of that many Philox blocks."""
    return Tiling(int(tiling.channels == 1), 4, 4, lanes, tiling.channels_last)


@triton.jit
def sample_of(SAMPLES_Y: tl.constexpr):
    """The program's sample, int64; the grid is (tiles, at most SAMPLES_Y samples, the rest)."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * SAMPLES_Y


@triton.jit
def of_sample(values_ptr, n, otherwise):
    """values_ptr[n], or what holds for all samples where there is no such tensor."""
    if values_ptr is None:
        return otherwise
    else:
        return tl.load(values_ptr + n)


@triton.jit
def timestep_of(ts_ptr, n, t, num_steps):
    """A sample's timestep. One that lies on the device and is out of range is the last."""
    t = of_sample(ts_ptr, n, t)
    return tl.where((t < 0) | (t >= num_steps), num_steps - 1, t)


@triton.jit
def draw_of(indices_ptr, n, index, stream):
    """A sample's draw, uint32: stream << 24 | index."""
    return ((of_sample(indices_ptr, n, index) & 0xFFFFFF) | (stream << 24)).to(tl.uint32)


@triton.jit
def zipped(parts):
    """a0 b0 c0 d0 a1 b1 … of 4 or 8 tensors [lanes]."""
    if len(parts) == 4:
        return tl.interleave(tl.interleave(parts[0], parts[2]), tl.interleave(parts[1], parts[3]))
    else:
        even = zipped((parts[0], parts[2], parts[4], parts[6]))
        return tl.interleave(even, zipped((parts[1], parts[3], parts[5], parts[7])))


@triton.jit
def unzipped(vector, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The 4 or 8 tensors [lanes] of which zipped() makes the vector."""
    even, odd = tl.split(tl.reshape(vector, (LANES * VECTOR // 2, 2)))
    if VECTOR == 4:
        a, c = tl.split(tl.reshape(even, (LANES, 2)))
        b, d = tl.split(tl.reshape(odd, (LANES, 2)))
        return a, b, c, d
    else:
        a, c, e, g = unzipped(even, LANES, 4)
        b, d, f, h = unzipped(odd, LANES, 4)
        return a, b, c, d, e, f, g, h


@triton.jit
def in_memory_order(
    values,
    FIRST: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    TILING: tl.constexpr,
):
    """The tile of which a tuple of tensors [lanes] has a lane's elements, in the order that the
    strides say."""
    CHANNELS: tl.constexpr = field(TILING, "channels")
    VECTOR: tl.constexpr = field(TILING, "vector")
    vectors = ()
    for j in tl.static_range(field(TILING, "vectors")):
        parts = ()
        for i in tl.static_range(VECTOR):
            parts += (
                values[
                    FIRST
                    + (j * VECTOR + i) // CHANNELS * PIXEL_STRIDE
                    + (j * VECTOR + i) % CHANNELS * CHANNEL_STRIDE
                ],
            )
        vectors += (zipped(parts),)
    return vectors


@triton.jit
def holds(tile, channels, pixels, lanes, TILING: tl.constexpr):
    """Which of a vector's elements, any vector's of the tile, the sample has."""
    LANES: tl.constexpr = field(TILING, "lanes")
    VECTOR: tl.constexpr = field(TILING, "vector")
    e = tl.arange(0, LANES * VECTOR)
    if field(TILING, "channels") == 0:
        return e + tile * (LANES * VECTOR) < channels * pixels
    else:
        left = tl.minimum(lanes - tile * LANES, LANES).to(tl.int32)
        return e < left * VECTOR


@triton.jit
def vectors_at(ptr, n, tile, lanes, VECTORS: tl.constexpr, TILING: tl.constexpr):
    """Pointers to the tile's vectors in a tensor that has VECTORS of them a lane."""
    LANES: tl.constexpr = field(TILING, "lanes")
    VECTOR: tl.constexpr = field(TILING, "vector")
    # As products of constants, so that the compiler knows how the addresses are aligned.
    ptr += n * lanes * (VECTORS * VECTOR) + tile * (LANES * VECTORS * VECTOR)
    e = tl.arange(0, LANES * VECTOR)
    pointers = ()
    for j in tl.static_range(VECTORS):
        pointers += (ptr + (e // VECTOR * (VECTORS * VECTOR) + (j * VECTOR + e % VECTOR)),)
    return pointers


@triton.jit
def elements_at(
    ptr, n, tile, channels, pixels, PARTS: tl.constexpr, PART: tl.constexpr, TILING: tl.constexpr
):
    """Pointers to the elements of the tile's Philox blocks, in the PART-th of PARTS equal runs of a
    tensor's channels."""
    LANES: tl.constexpr = field(TILING, "lanes")
    ptr += n * (PARTS * channels * pixels)
    if field(TILING, "channels_last"):
        first = 4 * (LANES * tile + tl.arange(0, LANES))
        channel = first // pixels
        pixel = first - channel * pixels
        offsets = ()
        for _ in tl.static_range(4):
            offsets += (pixel * (PARTS * channels) + PART * channels + channel,)
            pixel += 1
            channel += (pixel == pixels).to(tl.int64)
            pixel = tl.where(pixel == pixels, 0, pixel)
        return ptr + zipped(offsets)
    else:
        return ptr + PART * channels * pixels + (4 * LANES * tile + tl.arange(0, 4 * LANES))


@triton.jit
def pointers_to(ptr, n, tile, channels, pixels, lanes, TILING: tl.constexpr):
    """Pointers to the tile's vectors in a tensor like x."""
    if field(TILING, "channels") == 0:
        return (elements_at(ptr, n, tile, channels, pixels, 1, 0, TILING),)
    else:
        return vectors_at(ptr, n, tile, lanes, field(TILING, "vectors"), TILING)


@triton.jit
def load(ptr, n, tile, channels, pixels, lanes, TILING: tl.constexpr):
    """The tile of a tensor."""
    held = holds(tile, channels, pixels, lanes, TILING)
    pointers = pointers_to(ptr, n, tile, channels, pixels, lanes, TILING)
    vectors = ()
    for j in tl.static_range(field(TILING, "vectors")):
        vectors += (tl.load(pointers[j], mask=held, other=0).to(tl.float32),)
    return vectors


@triton.jit
def store(ptr, n, tile, channels, pixels, lanes, values, TILING: tl.constexpr):
    """Writes the tile of a tensor, rounded once to its dtype."""
    held = holds(tile, channels, pixels, lanes, TILING)
    pointers = pointers_to(ptr, n, tile, channels, pixels, lanes, TILING)
    for j in tl.static_range(field(TILING, "vectors")):
        tl.store(pointers[j], values[j].to(ptr.dtype.element_ty), mask=held)


@triton.jit
def load_halves(ptr, n, tile, channels, pixels, lanes, TILING: tl.constexpr):
    """The tiles of the first and the second half of a tensor's channels."""
    CHANNELS: tl.constexpr = field(TILING, "channels")
    VECTORS: tl.constexpr = field(TILING, "vectors")
    held = holds(tile, channels, pixels, lanes, TILING)
    if CHANNELS == 0:
        first = elements_at(ptr, n, tile, channels, pixels, 2, 0, TILING)
        second = elements_at(ptr, n, tile, channels, pixels, 2, 1, TILING)
        return (
            (tl.load(first, mask=held, other=0).to(tl.float32),),
            (tl.load(second, mask=held, other=0).to(tl.float32),),
        )
    elif CHANNELS == 1:
        return (
            load(ptr, 2 * n, tile, channels, pixels, lanes, TILING),
            load(ptr, 2 * n + 1, tile, channels, pixels, lanes, TILING),
        )
    else:
        # A pixel's two halves lie side by side.
        pointers = vectors_at(ptr, n, tile, lanes, 2 * VECTORS, TILING)
        parts = ()
        for j in tl.static_range(2 * VECTORS):
            vector = tl.load(pointers[j], mask=held, other=0).to(tl.float32)
            parts += unzipped(vector, field(TILING, "lanes"), field(TILING, "vector"))
        return (
            in_memory_order(parts, 0, 2 * CHANNELS, 1, TILING),
            in_memory_order(parts, CHANNELS, 2 * CHANNELS, 1, TILING),
        )


@triton.jit
def store_halves(
    ptr, n, tile, channels, pixels, lanes, first_half, second_half, TILING: tl.constexpr
):
    """Writes what load_halves() reads."""
    CHANNELS: tl.constexpr = field(TILING, "channels")
    VECTORS: tl.constexpr = field(TILING, "vectors")
    held = holds(tile, channels, pixels, lanes, TILING)
    dtype = ptr.dtype.element_ty
    if CHANNELS == 0:
        first = elements_at(ptr, n, tile, channels, pixels, 2, 0, TILING)
        second = elements_at(ptr, n, tile, channels, pixels, 2, 1, TILING)
        tl.store(first, first_half[0].to(dtype), mask=held)
        tl.store(second, second_half[0].to(dtype), mask=held)
    elif CHANNELS == 1:
        store(ptr, 2 * n, tile, channels, pixels, lanes, first_half, TILING)
        store(ptr, 2 * n + 1, tile, channels, pixels, lanes, second_half, TILING)
    else:
        LANES: tl.constexpr = field(TILING, "lanes")
        VECTOR: tl.constexpr = field(TILING, "vector")
        parts = ()  # a lane's elements of the first half, then those of the second
        for j in tl.static_range(VECTORS):
            parts += unzipped(first_half[j], LANES, VECTOR)
        for j in tl.static_range(VECTORS):
            parts += unzipped(second_half[j], LANES, VECTOR)
        pointers = vectors_at(ptr, n, tile, lanes, 2 * VECTORS, TILING)
        for j in tl.static_range(2 * VECTORS):
            vector = ()
            for i in tl.static_range(VECTOR):
                vector += (
                    parts[
                        (j * VECTOR + i) // (2 * CHANNELS) * CHANNELS
                        + (j * VECTOR + i) % CHANNELS
                        + (j * VECTOR + i) // CHANNELS % 2 * (VECTORS * VECTOR)
                    ],
                )
            tl.store(pointers[j], zipped(vector).to(dtype), mask=held)


@triton.jit
def draw(tile, pixels, index, seed, sample_id, TILING: tl.constexpr):
    """The tile's normals. index: uint32, stream << 24 | index; seed, sample_id: int64."""
    LANES: tl.constexpr = field(TILING, "lanes")
    CHANNELS: tl.constexpr = field(TILING, "channels")
    PIXELS: tl.constexpr = field(TILING, "pixels")
    lane = (LANES * tile).to(tl.uint32) + tl.arange(0, LANES).to(tl.uint32)
    vectors = ()
    if CHANNELS == 0:
        vectors += (zipped(normals(lane, index, sample_id, seed)),)
    else:
        z = ()
        for channel in tl.static_range(CHANNELS):
            first = lane * (PIXELS // 4) + (pixels // 4 * channel).to(tl.uint32)
            for i in tl.static_range(PIXELS // 4):
                z += normals(first + i, index, sample_id, seed)
        vectors += in_memory_order(z, 0, 1, PIXELS, TILING)
    return vectors
