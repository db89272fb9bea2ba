// How an op's elements are shared out: tiles of one sample each, in memory order, statically over
// the threads. A tile's noise does not depend on the sharing, so neither do the bits.
#pragma once

#include "granule.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

constexpr int64_t kPerThread = 8192;  // elements: 5 µs of work, what waking a thread costs

inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The noise of the tile at hand, a granule at a time.
class TileNoise {
 public:
  TileNoise(const Shape& shape, float* scratch) : shape_(shape), scratch_(scratch) {}

  // Elements [begin, end) of the sample, in memory order.
  void start(const NoiseKey& key, int64_t begin, int64_t end) {
    key_ = key;
    begin_ = begin;
    if (scratch_ != nullptr) {
      draw_channels_last(key, shape_, begin / shape_.channels, end / shape_.channels, scratch_);
    }
  }

  // `count` values from `offset` on, in a row of kGranule; those past `count` are of no meaning.
  const float* granule(int64_t offset, int count, float* buffer) const {
    if (scratch_ != nullptr) return scratch_ + (offset - begin_);
    draw_granule(key_, offset, count, buffer);
    return buffer;
  }

 private:
  const Shape& shape_;
  float* scratch_;  // channels_last only
  NoiseKey key_{};
  int64_t begin_ = 0;
};

// A shape without the layouts that are the same as contiguous.
inline Shape plain(Shape shape) {
  shape.channels_last = shape.channels_last && shape.channels > 1 && shape.pixels > 1;
  return shape;
}

// Elements of a tile, and how many tiles a sample has: a function of the layout alone.
struct Tiling {
  int64_t tile, per_sample;

  explicit Tiling(const Shape& shape)
      : tile(plain(shape).channels_last ? tile_pixels(shape) * shape.channels : kTile),
        per_sample((shape.elements() + tile - 1) / tile) {}
};

// body(noise, sample, begin, end) for every tile.
template <class Body>
void for_each_tile(Shape shape, int threads, const Body& body) {
  const int64_t elements = shape.elements();
  if (shape.samples == 0 || elements == 0) return;
  shape = plain(shape);
  const auto [tile, per_sample] = Tiling(shape);
  const int64_t tiles = shape.samples * per_sample;
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + shape.samples * elements / kPerThread));
  const int64_t floats = shape.channels_last ? channels_last_floats(shape) : 0;
  struct Scratch {
    float* data;
    ~Scratch() { delete[] data; }
  } scratch{floats > 0 ? new float[static_cast<size_t>(floats * threads)] : nullptr};

  const auto run_tile = [&, tile = tile, per_sample = per_sample](TileNoise& noise, int64_t i) {
    const int64_t begin = i % per_sample * tile;
    body(noise, i / per_sample, begin, begin + tile < elements ? begin + tile : elements);
  };
  if (threads == 1) {
    TileNoise noise(shape, scratch.data);
    for (int64_t i = 0; i < tiles; ++i) run_tile(noise, i);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    TileNoise noise(shape, floats > 0 ? scratch.data + floats * thread_index() : nullptr);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) run_tile(noise, i);
  }
}

inline int granule_length(int64_t offset, int64_t end) {
  return end - offset < kGranule ? static_cast<int>(end - offset) : kGranule;
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
