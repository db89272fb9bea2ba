// How an op's elements are shared out on a GPU. A tile is what one unit of threads takes of one
// sample: 32 lanes of a warp and about 16 elements a lane where the shape is regular, one thread
// and one Philox block of 4 elements elsewhere. An op's body is a function of (tile, lane) for host
// and device alike, so that a machine without a GPU can run every tile of a problem.
#pragma once

#include "../core/noise.h"
#include "../core/normal.h"
#include "access.cuh"

namespace ddpm_fast {
namespace cuda {

constexpr int kThreads = 128;  // of a block: one warp for each scheduler of a multiprocessor
constexpr int kWarp = 32;

// n / divisor for n < 2^31 by one multiplication: with s = ceil(log2 divisor), the multiplier
// ceil(2^(31 + s) / divisor) is too large by less than 2^s (Granlund & Montgomery, PLDI 1994).
struct Divider {
  uint32_t multiplier, shift;

  DDPM_FAST_HD uint32_t quotient(uint32_t n) const {
    uint32_t high, low;
    ScalarLanes::mul_hi_lo(multiplier, 2 * n, high, low);
    return high >> shift;
  }
};

inline Divider divider(uint64_t divisor) {
  uint32_t log2 = 0;
  while (uint64_t{1} << log2 < divisor) ++log2;
  const uint64_t power = uint64_t{1} << (31 + log2);
  return {static_cast<uint32_t>((power + divisor - 1) / divisor), log2};
}

// All tiles of a problem, samples one after the other, each of `elements` elements.
struct Tiles {
  int64_t elements;
  uint64_t count, per_sample;
  Divider by_sample;  // divides by per_sample where count < 2^31
};

inline Tiles tiles_of(const Shape& shape, int64_t tile_elements) {
  const int64_t elements = shape.elements();
  const uint64_t per_sample = (elements + tile_elements - 1) / tile_elements;
  const uint64_t count = shape.samples * per_sample;
  const bool fast = count > 0 && count >> 31 == 0;
  return {elements, count, per_sample, fast ? divider(per_sample) : Divider{}};
}

// A sample's timestep. One that lies on the device is brought into the schedule.
template <class Params>
DDPM_FAST_HD int64_t timestep_of(const Params& p, int64_t n) {
  if (p.ts == nullptr) return p.t;
  const uint64_t t = static_cast<uint64_t>(p.ts[n]), steps = static_cast<uint64_t>(p.num_steps);
  return static_cast<int64_t>(t < steps ? t : steps - 1);
}

// The four normals of a Philox block: elements 4 * block .. 4 * block + 3 of a sample.
DDPM_FAST_HD void draw_block(const NoiseKey& key, uint32_t block, float (&z)[4]) {
  uint32_t c[4] = {block, key.draw, static_cast<uint32_t>(key.sample),
                   static_cast<uint32_t>(key.sample >> 32)};
  philox4x32_10<ScalarLanes>(c, static_cast<uint32_t>(key.seed),
                             static_cast<uint32_t>(key.seed >> 32));
  box_muller<ScalarLanes>(c[0], c[1], z[0], z[1]);
  box_muller<ScalarLanes>(c[2], c[3], z[2], z[3]);
}

// The elements of one Philox block, one after the other.
struct Block {
  int64_t channels, pixels;  // of the shape
  bool channels_last;
  int64_t channel, pixel;  // of the element at hand
  int count;               // 4, or fewer at the sample's end

  DDPM_FAST_HD Block(int64_t channels, int64_t pixels, bool channels_last, int64_t channel,
                     int64_t pixel, int count)
      : channels(channels),
        pixels(pixels),
        channels_last(channels_last),
        channel(channel),
        pixel(pixel),
        count(count) {}

  // Any of any shape; past the sample's end it has no elements.
  DDPM_FAST_HD Block(const Shape& shape, int64_t block)
      : channels(shape.channels), pixels(shape.pixels), channels_last(shape.channels_last) {
    const int64_t element = 4 * block, left = shape.elements() - element;
    count = left < 4 ? (left > 0 ? static_cast<int>(left) : 0) : 4;
    channel = element / pixels;
    pixel = element - channel * pixels;
  }
  DDPM_FAST_HD void next() {
    if (++pixel == pixels) pixel = 0, ++channel;
  }
  // In the sample, in memory order.
  DDPM_FAST_HD int64_t offset() const {
    return channels_last ? pixel * channels + channel : channel * pixels + pixel;
  }
  // In one half of a sample with twice as many channels.
  DDPM_FAST_HD int64_t offset_in_half(int half) const {
    return channels_last ? (2 * pixel + half) * channels + channel
                         : (half * channels + channel) * pixels + pixel;
  }
};

// Layouts: where a lane's vectors begin, counted in elements from the tile's first, and which noise
// belongs to them. Vectors of a whole sample only: a tile's last may lie past its end, entirely.

// Elements in memory order are elements in noise order; neighbouring lanes take neighbouring
// vectors of kVector elements.
template <int kVector_>
struct Contiguous {
  static constexpr int kVector = kVector_;
  static constexpr int kVectors = 16 / kVector;
  static constexpr int kElements = 16;  // of a lane
  static constexpr int kChannels = 0;   // any number

  static constexpr int kStride = kWarp * kVector;  // from one vector of a lane to its next

  static DDPM_FAST_HD int begin(int lane) { return lane * kVector; }

  static bool fits(const Shape& shape) {
    return !shape.channels_last && shape.elements() % kVector == 0;
  }

  // z of the lane's elements, in memory order.
  static DDPM_FAST_HD void draw(const NoiseKey& key, const Shape&, uint32_t tile, int lane,
                                float (&z)[kElements]) {
    const uint32_t first = tile * (kWarp * kElements / 4) + begin(lane) / 4;
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements / 4; ++i) {
      float block[4];
      draw_block(key, first + past_first(i), block);
      DDPM_FAST_UNROLL
      for (int j = 0; j < 4; ++j) z[4 * i + j] = block[j];
    }
  }

  // The lane's i-th Philox block. Where it lies past the sample's end it has no elements.
  static DDPM_FAST_HD Block block(const Shape& shape, uint32_t tile, int lane, int i) {
    const int64_t elements = shape.elements();
    const int64_t first = static_cast<int64_t>(tile) * kWarp * kElements + begin(lane);
    const int64_t element = first + 4 * past_first(i);
    return {1, elements, false, 0, element, element < elements ? 4 : 0};
  }

 private:
  static DDPM_FAST_HD int past_first(int i) {
    constexpr int kBlocks = kVector / 4;  // of a vector
    return i / kBlocks * (kStride / 4) + i % kBlocks;
  }
};

// [pixels, channels] in memory: a lane takes kPixels whole pixels. Four pixels of one channel are a
// Philox block, so kPixels is a multiple of 4 and the sample's pixels are one of kPixels.
template <int kChannels_, int kPixels, int kVector_>
struct ChannelsLast {
  static constexpr int kVector = kVector_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kElements = kChannels * kPixels;
  static constexpr int kVectors = kElements / kVector;

  static_assert(kPixels % 4 == 0 && kElements % kVector == 0, "whole blocks, whole vectors");

  static constexpr int kStride = kVector;

  static DDPM_FAST_HD int begin(int lane) { return lane * kElements; }

  static bool fits(const Shape& shape) {
    return shape.channels_last && shape.channels == kChannels && shape.pixels % kPixels == 0;
  }

  static DDPM_FAST_HD void draw(const NoiseKey& key, const Shape& shape, uint32_t tile, int lane,
                                float (&z)[kElements]) {
    const uint32_t first = (tile * kWarp + lane) * (kPixels / 4);
    DDPM_FAST_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const uint32_t channel = static_cast<uint32_t>(c * (shape.pixels / 4));
      DDPM_FAST_UNROLL
      for (int i = 0; i < kPixels / 4; ++i) {
        float block[4];
        draw_block(key, channel + first + i, block);
        DDPM_FAST_UNROLL
        for (int j = 0; j < 4; ++j) z[(4 * i + j) * kChannels + c] = block[j];
      }
    }
  }

  static DDPM_FAST_HD Block block(const Shape& shape, uint32_t tile, int lane, int i) {
    constexpr int kBlocks = kPixels / 4;  // of a channel
    const int64_t pixel =
        (static_cast<int64_t>(tile) * kWarp + lane) * kPixels + i % kBlocks * int64_t{4};
    return {kChannels, shape.pixels, true, i / kBlocks, pixel, pixel < shape.pixels ? 4 : 0};
  }
};

// One lane's place in a tensor of a layout, and its way in and out.
template <class Layout>
struct Lane {
  int64_t elements;  // of a sample
  int64_t sample;    // its first element
  int64_t first;     // the lane's first element
  int left;          // from there to the sample's end, or as many as a tile has

  DDPM_FAST_HD Lane(const Tiles& tiles, uint32_t n, uint32_t tile, int lane)
      : elements(tiles.elements), sample(n * elements) {
    constexpr int kTile = kWarp * Layout::kElements;
    const int64_t begin = static_cast<int64_t>(tile) * kTile + Layout::begin(lane);
    const int64_t to_end = elements - begin;
    first = sample + begin;
    left = to_end < kTile ? static_cast<int>(to_end) : kTile;
  }

  DDPM_FAST_HD bool holds(int vector) const { return vector * Layout::kStride < left; }

  // What lies past the sample's end is not read, and has no meaning in `out`.
  template <class Type>
  DDPM_FAST_HD void load(const void* base, float (&out)[Layout::kElements]) const {
    const void* p = element(base, first, Type::kSize);
#if !defined(__CUDA_ARCH__)
    std::memset(out, 0, sizeof out);  // a host's compiler minds what a GPU's registers do not
#endif
    DDPM_FAST_UNROLL
    for (int i = 0; i < Layout::kVectors; ++i) {
      if (holds(i)) {
        cuda::load<Type, Layout::kVector>(element(p, i * Layout::kStride, Type::kSize),
                                          out + i * Layout::kVector);
      }
    }
  }
  template <class Type>
  DDPM_FAST_HD void store(void* base, const float (&values)[Layout::kElements]) const {
    void* p = element(base, first, Type::kSize);
    DDPM_FAST_UNROLL
    for (int i = 0; i < Layout::kVectors; ++i) {
      if (holds(i)) {
        cuda::store<Type, Layout::kVector>(element(p, i * Layout::kStride, Type::kSize),
                                           values + i * Layout::kVector);
      }
    }
  }

  // Where the type is known only when the kernel runs.
  DDPM_FAST_HD void load(const void* base, DType dtype, float (&out)[Layout::kElements]) const {
    switch (dtype) {
      case DType::kFloat32: return load<Float32>(base, out);
      case DType::kBFloat16: return load<BFloat16>(base, out);
      default: return load<Float16>(base, out);
    }
  }
  DDPM_FAST_HD void store(void* base, DType dtype, const float (&values)[Layout::kElements]) const {
    switch (dtype) {
      case DType::kFloat32: return store<Float32>(base, values);
      case DType::kBFloat16: return store<BFloat16>(base, values);
      default: return store<Float16>(base, values);
    }
  }
};

inline bool aligned(const void* p, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Below this a warp has too little of a sample; one thread a Philox block has more lanes at work.
constexpr int64_t kMinElements = 256;

inline bool is_regular(const Shape& shape) { return shape.elements() >= kMinElements; }

// Elements of a vector: 16 bytes of the widest type at hand.
template <class... Types>
constexpr int vector_of() {
  return ((Types::kSize == 4) || ...) ? 4 : 8;
}

// visit(layout) for the one that the shape fits; false if there is none. Channels_last has vectors
// for images (3 channels) and latents (4).
template <int kVector, class Visit>
bool visit_layout(const Shape& shape, const Visit& visit) {
  using Plain = Contiguous<kVector>;
  using Three = ChannelsLast<3, kVector == 8 ? 8 : 4, kVector>;
  using Four = ChannelsLast<4, 4, kVector>;
  if (Plain::fits(shape)) return visit(Plain{}), true;
  if (Three::fits(shape)) return visit(Three{}), true;
  if (Four::fits(shape)) return visit(Four{}), true;
  return false;
}

// Tile `tile` of a problem; lanes count from 0 to Body::kLanes - 1.
template <class Body, class Params>
DDPM_FAST_HD auto run_tile(const Params& p, const Tiles& tiles, uint64_t tile, int lane) {
  if constexpr (Body::kLanes == kWarp) {  // count < 2^31: 2^40 elements lie in no memory
    const uint32_t i = static_cast<uint32_t>(tile), n = tiles.by_sample.quotient(i);
    return Body::run(p, tiles, n, i - n * static_cast<uint32_t>(tiles.per_sample), lane);
  } else {
    const uint64_t n = tiles.count >> 31 == 0
                           ? tiles.by_sample.quotient(static_cast<uint32_t>(tile))
                           : tile / tiles.per_sample;
    return Body::run(p, tiles, static_cast<int64_t>(n),
                     static_cast<int64_t>(tile - n * tiles.per_sample));
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
