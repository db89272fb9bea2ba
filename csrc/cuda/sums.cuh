// Sums over a sample, in an order that its elements' layout alone decides: a lane adds up its
// elements, a warp its lanes in pairs, which leaves one share a warp in memory; then threads add up
// a sample's shares, each every so many, and warps their threads in pairs. No atomics. The batch,
// the grid and the time at which a warp runs have no say in it.
#pragma once

#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

template <int kSums_, class Number = float>
struct Sums {
  static constexpr int kSums = kSums_;
  Number of[kSums];

  DDPM_FAST_HD void operator+=(const Sums& other) {
    DDPM_FAST_UNROLL
    for (int k = 0; k < kSums; ++k) of[k] = of[k] + other.of[k];
  }
};

// A number and what float32 has no room for of it, by the sums and products whose rounding error is
// a float (Knuth, TAOCP 2, 4.2.2; Dekker 1971): a few a sample take the place of float64, which
// some GPUs have next to nothing for.
struct TwoFloats {
  float value, rest;

  DDPM_FAST_HD TwoFloats operator+(const TwoFloats& other) const {
    const float sum = value + other.value, added = sum - value;
    const float lost = (value - (sum - added)) + (other.value - added);
    return {sum, rest + other.rest + lost};
  }
  DDPM_FAST_HD TwoFloats operator*(const TwoFloats& other) const {
    const float product = value * other.value;
    const float lost = ScalarLanes::fma(value, other.value, -product);
    return {product, lost + (value * other.rest + rest * other.value)};
  }
  DDPM_FAST_HD TwoFloats over(int64_t divisor) const {
    const float high = static_cast<float>(divisor);
    const float low = static_cast<float>(divisor - static_cast<int64_t>(high));
    const float quotient = value / high;
    const float left = ScalarLanes::fma(-quotient, high, value) - quotient * low;
    return {quotient, (left + rest) / high};
  }
  // In one float. Of an infinite number the rest is NaN.
  DDPM_FAST_HD float rounded() const {
    const bool finite = value - value == 0.0f;
    return finite ? value + rest : value;
  }
};

// A lane's sum of what its elements give: four at a time, so that none waits for the one before.
struct LaneSum {
  float places[4];

  DDPM_FAST_HD LaneSum() { places[0] = places[1] = places[2] = places[3] = 0.0f; }
  DDPM_FAST_HD void add(int i, float x) { places[i % 4] += x; }
  DDPM_FAST_HD void add_square(int i, float x) {
    places[i % 4] = ScalarLanes::fma(x, x, places[i % 4]);
  }
  DDPM_FAST_HD float total() const { return (places[0] + places[1]) + (places[2] + places[3]); }
};

// Lane 0 of the result has what 32 lanes add up to: those 16 apart first, then 8, 4, 2 and 1.
#if defined(__CUDACC__)
__device__ __forceinline__ float from_lane(int apart, float x) {
  return __shfl_down_sync(0xFFFFFFFFu, x, apart);
}
__device__ __forceinline__ TwoFloats from_lane(int apart, const TwoFloats& x) {
  return {from_lane(apart, x.value), from_lane(apart, x.rest)};
}
template <int kSums, class Number>
__device__ __forceinline__ void add_lanes(Sums<kSums, Number>& sums) {
  DDPM_FAST_UNROLL
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    DDPM_FAST_UNROLL
    for (int k = 0; k < kSums; ++k) sums.of[k] = sums.of[k] + from_lane(apart, sums.of[k]);
  }
}
#else
template <class SumsOfOne>
SumsOfOne add_lanes(const SumsOfOne* lanes) {
  SumsOfOne sums[kWarp];
  for (int i = 0; i < kWarp; ++i) sums[i] = lanes[i];
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    for (int i = 0; i < apart; ++i) sums[i] += sums[i + apart];
  }
  return sums[0];
}
#endif

template <int kSums>
DDPM_FAST_HD void put_share(float* scratch, uint64_t tile, const Sums<kSums>& sums) {
  DDPM_FAST_UNROLL
  for (int k = 0; k < kSums; ++k) scratch[tile * kSums + k] = sums.of[k];
}

// How many threads add up a sample's shares: all of a block where there are many.
DDPM_FAST_HD int threads_for(uint64_t shares) { return shares > 4 * kWarp ? kThreads : kWarp; }

// What one of those threads adds up: every `threads`-th share.
template <int kSums>
DDPM_FAST_HD Sums<kSums, TwoFloats> add_shares(const float* scratch, uint64_t sample,
                                               uint64_t shares, int thread, int threads) {
  const float* share = scratch + sample * shares * kSums;
  Sums<kSums, TwoFloats> sums{};
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  for (uint64_t i = thread; i < shares; i += threads) {
    DDPM_FAST_UNROLL
    for (int k = 0; k < kSums; ++k) sums.of[k] = sums.of[k] + TwoFloats{share[i * kSums + k], 0.0f};
  }
  return sums;
}

}  // namespace cuda
}  // namespace ddpm_fast
