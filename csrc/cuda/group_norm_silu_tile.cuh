// How group_norm_silu's elements are shared out on a GPU. A tile is what one block takes of one
// sample: a chunk of its pixels, and as many channels as the block's lanes reach. Whole vectors of
// 16 bytes lie along the channels in channels_last, along the pixels elsewhere; what they cannot
// reach is taken element by element. Bodies are functions of (tile, thread) for host and device.
#pragma once

#include <algorithm>

#include "../core/group_norm_silu.h"
#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

constexpr int kWarps = kThreads / kWarp;

// From sample to sample and so on, in elements.
struct TensorStrides {
  int64_t sample, channel, row, pixel;
};

DDPM_FAST_HD TensorStrides strides_in(const GroupNormShape& shape, const PixelStrides& strides) {
  if (shape.channels_last) return {strides.sample, 1, strides.row, strides.pixel};
  return {shape.channels * shape.pixels(), shape.pixels(), shape.cols, 1};
}

// Of a tensor that is dense in channels_last, too.
DDPM_FAST_HD PixelStrides dense_strides(const GroupNormShape& shape) {
  return {shape.pixels() * shape.channels, shape.cols * shape.channels, shape.channels};
}

// Layouts: what a lane reads at once, kChannels side by side or kPixels; kDType in memory. Packed
// is a vector as it lies there, so that loads wait for nobody.
template <class Type_, bool kLast>
struct WholeVectors {
  using Type = Type_;
  using Packed = Vector<16>;
  static constexpr int kElements = 16 / Type::kSize;
  static constexpr int kChannels = kLast ? kElements : 1;
  static constexpr int kPixels = kLast ? 1 : kElements;

  static DDPM_FAST_HD bool channels_last(bool) { return kLast; }
  static DDPM_FAST_HD Packed load(const void* base, DType, int64_t i) {
    return load_vector<16>(element(base, i, Type::kSize));
  }
  static DDPM_FAST_HD void store(void* base, DType, int64_t i, const Packed& packed) {
    store_vector(element(base, i, Type::kSize), packed);
  }
  static DDPM_FAST_HD void unpack(const Packed& packed, DType, float (&values)[kElements]) {
    Type::unpack(packed.words, values);
  }
  static DDPM_FAST_HD Packed pack(const float (&values)[kElements], DType) {
    Packed packed;
    Type::pack(values, packed.words);
    return packed;
  }
};
template <class Type>
using ChannelVectors = WholeVectors<Type, true>;
template <class Type>
using PixelVectors = WholeVectors<Type, false>;

struct Singles {
  struct Packed {
    float value;
  };
  static constexpr int kElements = 1, kChannels = 1, kPixels = 1;

  static DDPM_FAST_HD bool channels_last(bool last) { return last; }
  static DDPM_FAST_HD Packed load(const void* base, DType dtype, int64_t i) {
    return {value_at(base, dtype, i)};
  }
  static DDPM_FAST_HD void store(void* base, DType dtype, int64_t i, const Packed& packed) {
    put(base, dtype, i, packed.value);
  }
  static DDPM_FAST_HD void unpack(const Packed& packed, DType, float (&values)[1]) {
    values[0] = packed.value;
  }
  static DDPM_FAST_HD Packed pack(const float (&values)[1], DType dtype) {
    float value = values[0], unused;
    if (dtype == DType::kBFloat16) value = ScalarLanes::from_bits(bf16_pair(value, 0.0f) << 16);
    if (dtype == DType::kFloat16) floats_from_half_pair(half_pair(value, 0.0f), value, unused);
    return {value};
  }
};

// Vectors that a thread has in flight at once.
constexpr int kInFlight = 4;

// All tiles of a problem: samples, their chunks, their channels, the last fastest.
struct GroupTiles {
  uint64_t count;
  uint32_t chunks, of_channels;  // of a sample; of a chunk
  uint32_t chunk, pixels;        // of a chunk; of a sample
  uint32_t channels, of_tile;    // of a sample; of a tile
  Divider by_chunks, by_channels, by_cols, by_group;
  uint32_t group;  // channels of one
  uint32_t cols;
  int bits;   // log2 of a warp's lanes that lie along channels
  int warps;  // of a block
  bool channels_last;

  // Lanes whose sums belong together lie `from`, from / 2, ... `to` apart in a warp, and where the
  // channels are last in all warps of a block.
  DDPM_FAST_HD int from() const { return (channels_last ? kWarp : kWarp >> bits) / 2; }
  DDPM_FAST_HD int to() const { return channels_last ? 1 << bits : 1; }
};

inline int log2_up(uint64_t n) {
  int log2 = 0;
  while (uint64_t{1} << log2 < n) ++log2;
  return log2;
}

// Tiles of `chunk` pixels and tiles.of_tile channels. Of more than 2^31 pixels or tiles there is no
// count, and no launch.
inline void cut(const GroupNormShape& shape, int64_t chunk, GroupTiles& tiles) {
  const int64_t pixels = shape.pixels();
  const int64_t chunks = (pixels + chunk - 1) / chunk;
  const int64_t of_channels = (shape.channels + tiles.of_tile - 1) / tiles.of_tile;
  if (pixels >> 31 != 0 || chunk >> 31 != 0 || shape.channels >> 31 != 0) return;
  const uint64_t count = static_cast<uint64_t>(shape.samples) * chunks * of_channels;
  if (count >> 31 != 0) return;
  tiles.count = count;
  tiles.chunks = static_cast<uint32_t>(chunks);
  tiles.of_channels = static_cast<uint32_t>(of_channels);
  tiles.chunk = static_cast<uint32_t>(chunk);
  tiles.pixels = static_cast<uint32_t>(pixels);
  tiles.channels = static_cast<uint32_t>(shape.channels);
  tiles.cols = static_cast<uint32_t>(shape.cols);
  tiles.by_chunks = divider(tiles.chunks);
  tiles.by_channels = divider(tiles.of_channels);
  tiles.by_cols = divider(tiles.cols);
  tiles.group = static_cast<uint32_t>(shape.group_channels());
  tiles.by_group = divider(tiles.group);
}

// Of chunks of `chunk` pixels; 0: as many as the threads have in flight at once.
template <class Layout>
GroupTiles group_tiles(const GroupNormShape& shape, int64_t chunk) {
  GroupTiles tiles{};
  const bool last = tiles.channels_last = Layout::channels_last(shape.channels_last);
  const int64_t pixels = shape.pixels(), most = chunk > 0 ? std::min(chunk, pixels) : pixels;
  const int64_t vectors = (shape.channels + Layout::kChannels - 1) / Layout::kChannels;
  // Lanes along what lies side by side, as far as it reaches.
  const int64_t in_line = (most + Layout::kPixels * kInFlight - 1) / (Layout::kPixels * kInFlight);
  const int bits = last ? log2_up(vectors) : 5 - std::min(5, log2_up(in_line));
  tiles.bits = std::min(5, bits);
  const int64_t along_pixels = (kWarp >> tiles.bits) * (last ? kWarps : 1) * Layout::kPixels;
  tiles.warps = kWarps;
  tiles.of_tile = (1u << tiles.bits) * (last ? 1 : kWarps) * Layout::kChannels;
  cut(shape, chunk > 0 ? chunk : along_pixels * kInFlight, tiles);
  return tiles;
}

// A thread's place in its tile: pixels first, first + step, ... before end, of kChannels channels.
template <class Layout>
struct GroupLane {
  uint32_t n, chunk, channel, first, step, end;
  uint32_t in_tile;  // the channel, counted from the tile's first
  bool inside;       // the tile's channels
  bool leads;        // of the lanes whose sums belong together, the one that has them in the end

  DDPM_FAST_HD GroupLane(const GroupTiles& tiles, uint32_t tile, int thread) {
    const uint32_t i = tiles.by_channels.quotient(tile), of_channel = tile - i * tiles.of_channels;
    n = tiles.by_chunks.quotient(i);
    chunk = i - n * tiles.chunks;
    const uint32_t lane = thread % kWarp, warp = thread / kWarp, bits = tiles.bits;
    uint32_t along_channels, along_pixels;
    if (Layout::channels_last(tiles.channels_last)) {
      along_channels = lane & ((1u << bits) - 1);
      along_pixels = warp << (5 - bits) | lane >> bits;
      step = (kWarp * tiles.warps >> bits) * Layout::kPixels;
    } else {
      along_channels = warp << bits | lane >> (5 - bits);
      along_pixels = lane & ((kWarp >> bits) - 1);
      step = (kWarp >> bits) * Layout::kPixels;
    }
    in_tile = along_channels * Layout::kChannels;
    channel = of_channel * tiles.of_tile + in_tile;
    inside = in_tile < tiles.of_tile && channel < tiles.channels;
    leads = inside && along_pixels == 0;
    const uint32_t begin = chunk * tiles.chunk;
    first = begin + along_pixels * Layout::kPixels;
    end = tiles.pixels - begin < tiles.chunk ? tiles.pixels : begin + tiles.chunk;
  }
  DDPM_FAST_HD bool holds(uint32_t pixel, int i) const { return pixel + i * step < end; }

  // Where a vector lies that begins at a pixel.
  DDPM_FAST_HD int64_t at(const GroupTiles& tiles, const TensorStrides& strides,
                          uint32_t pixel) const {
    const int64_t begin = n * strides.sample + channel * strides.channel;
    if constexpr (Layout::kPixels > 1) return begin + pixel;
    const uint32_t row = tiles.by_cols.quotient(pixel);
    return begin + row * strides.row + (pixel - row * tiles.cols) * strides.pixel;
  }
};

// The vectors that a thread has in flight, as they lie in memory.
template <class Layout>
struct InFlight {
  typename Layout::Packed of[kInFlight];

  DDPM_FAST_HD void load(const void* base, DType dtype, const TensorStrides& strides,
                         const GroupTiles& tiles, const GroupLane<Layout>& lane, uint32_t pixel) {
#if !defined(__CUDA_ARCH__)
    std::memset(of, 0, sizeof of);  // a host's compiler minds what a GPU's registers do not
#endif
    DDPM_FAST_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!lane.holds(pixel, i)) continue;
      of[i] = Layout::load(base, dtype, lane.at(tiles, strides, pixel + i * lane.step));
    }
  }
};

// Whether vectors reach a tensor wherever a pixel's channels, or a channel's pixels, begin: one
// sample's as if there were others, so that it comes to the same bits among them.
template <class Layout>
bool vectors_reach(const void* base, const GroupNormShape& shape, const PixelStrides& strides) {
  constexpr int64_t kElements = Layout::kElements;
  if (base == nullptr) return true;
  if (!aligned(base)) return false;
  const auto whole = [](int64_t size, int64_t stride) {
    return size == 1 || stride % kElements == 0;
  };
  return !shape.channels_last ||
         (strides.sample % kElements == 0 && whole(shape.rows, strides.row) &&
          whole(shape.cols, strides.pixel));
}

// visit(layout) for the one whose vectors reach every tensor, which `reached(layout)` says, and end
// where a chunk does; Singles if there is none.
template <class Reached, class Visit>
void visit_vectors(const GroupNormShape& shape, DType dtype, int64_t chunk, const Reached& reached,
                   const Visit& visit) {
  const auto fits = [&](auto layout) {
    using Layout = decltype(layout);
    if (Layout::Type::kDType != dtype || !Layout::channels_last(false) == shape.channels_last ||
        shape.channels % Layout::kChannels != 0 || shape.pixels() % Layout::kPixels != 0 ||
        chunk % Layout::kPixels != 0 || !reached(layout)) {
      return false;
    }
    return visit(layout), true;
  };
  const auto of_type = [&](auto type) {
    using Type = decltype(type);
    return fits(ChannelVectors<Type>{}) || fits(PixelVectors<Type>{});
  };
  if (!(of_type(Float32{}) || of_type(BFloat16{}) || of_type(Float16{}))) visit(Singles{});
}

}  // namespace cuda
}  // namespace ddpm_fast
