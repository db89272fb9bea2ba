// Sums with one order of additions for every instruction set, number of threads and batch. The i-th
// element of a granule is added, in float32, in place i % kPlaces; the places of a tile's granules,
// in float64; a tile's places in pairs; a sample's tiles one after the other.
#pragma once

#include <array>
#include <vector>

#include "../core/add_noise.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

constexpr int kPlaces = 16;
constexpr int kVectors = kPlaces / kWidth;  // vectors that hold a float32 for each place

static_assert(kPlaces % kWidth == 0 && kGranule % kPlaces == 0, "whole vectors");

// Lanes past `count` of the vector that begins at j become 0.
DDPM_FAST_HD VecF only_before(int count, int j, VecF v) {
  VecI lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return Lanes::select(lane + j < count, v, Lanes::splat(0.0f));
}

struct GranuleSum {
  VecF rows[kVectors] = {};
};

struct TileSum {
  double places[kPlaces] = {};

  DDPM_FAST_HD void add(const GranuleSum& sum) {
    alignas(64) float values[kPlaces];
    for (int r = 0; r < kVectors; ++r) store_unaligned(values + r * kWidth, sum.rows[r]);
    for (int i = 0; i < kPlaces; ++i) places[i] += values[i];
  }
  void add(int i, double value) { places[i % kPlaces] += value; }

  double total() const {
    double sums[kPlaces];
    for (int i = 0; i < kPlaces; ++i) sums[i] = places[i];
    for (int n = kPlaces / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
    }
    return sums[0];
  }
};

// What the tiles of each sample add up to.
template <int kSums>
class SampleSums {
 public:
  explicit SampleSums(const Shape& shape)
      : tiling_(shape), shares_(static_cast<size_t>(shape.samples * tiling_.per_sample)) {}

  std::array<double, kSums>& share(int64_t sample, int64_t begin) {
    return shares_[sample * tiling_.per_sample + begin / tiling_.tile];
  }
  std::array<double, kSums> total(int64_t sample) const {
    std::array<double, kSums> sums{};
    for (int64_t i = 0; i < tiling_.per_sample; ++i) {
      for (int k = 0; k < kSums; ++k) sums[k] += shares_[sample * tiling_.per_sample + i][k];
    }
    return sums;
  }

 private:
  Tiling tiling_;
  std::vector<std::array<double, kSums>> shares_;
};

// x_0 in [-1, 1] as float32, of pixels too; otherwise as load().
inline const float* load_unit(const void* base, DType dtype, int64_t offset, int n, float* buffer) {
  const float* x0 = load(base, dtype, offset, n, buffer);
  if (dtype != DType::kUInt8) return x0;
  for (int j = 0; j < kGranule; j += kWidth) {
    const VecF centred = load_unaligned<VecF>(buffer + j) - Lanes::splat(127.5f);
    store_unaligned(buffer + j, unit_from_pixel<Lanes>(centred));
  }
  return buffer;
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
