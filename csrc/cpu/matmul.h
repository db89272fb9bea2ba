// The inner product of every convolution: kTileRows rows of inputs by one block of output channels,
// summed over k in order, so that a result's bits depend on neither the batch nor the threads.
#pragma once

#include <algorithm>
#include <memory>

#include "../core/conv2d.h"
#include "simd.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// As many sums as registers hold beside the operands: 8 x 2 of 32, 6 x 2 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileChannels = kTileVectors * kWidth;
static_assert(kConvBlock % kTileChannels == 0);

// Not bound to the same bits everywhere, as Lanes::fma is, which without FMA is a call a lane.
DDPM_FAST_HD VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX2__)
  return Lanes::fma(a, b, c);
#else
  return a * b + c;
#endif
}

struct TileSums {
  VecF sums[kTileRows][kTileVectors];
};

// Products that are added up in a row, before their sum joins the others: the error of a sum grows
// with the length of its chain.
constexpr int64_t kChain = 128;

// sums[r][·] += sum over k < depth of rows[r][offset + k x_stride] * weights[k w_stride + ·], the
// first kVectors vectors of them.
template <int kVectors = kTileVectors>
DDPM_FAST_HD void multiply(const float* const (&rows)[kTileRows], int64_t offset, int64_t x_stride,
                           int64_t depth, const float* weights, int64_t w_stride, TileSums& tile) {
  const float* x[kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) x[r] = rows[r] + offset;
  for (int64_t first = 0; first < depth; first += kChain) {
    const int64_t end = std::min(first + kChain, depth);
    VecF sums[kTileRows][kVectors]{};
    for (int64_t k = first; k < end; ++k) {
      VecF w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = load_unaligned<VecF>(weights + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const VecF value = Lanes::splat(x[r][k * x_stride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(value, w[v], sums[r][v]);
      }
      weights += w_stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) tile.sums[r][v] += sums[r][v];
    }
  }
}

// `count` > 0 floats, those past a vector's width left out; the missing lanes are zero.
DDPM_FAST_HD VecF load_some(const float* p, int64_t count) {
  if (count >= kWidth) return load_unaligned<VecF>(p);
  VecF v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
DDPM_FAST_HD void store_some(float* p, int64_t count, VecF v) {
  if (count >= kWidth) return store_unaligned(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

// Memory of a thread's own, kept from call to call: fresh pages cost more than the work on them.
inline float* thread_memory(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t held = 0;
  if (held < floats) {
    held = 0;
    memory.reset();  // first: two need more than one
    memory.reset(new float[static_cast<size_t>(floats)]);
    held = floats;
  }
  return memory.get();
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
