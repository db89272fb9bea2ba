// What group_norm_silu's kernels share: the approximations of a GPU's own units, and sums of a
// block's threads in an order that the shape alone decides.
#pragma once

#include "group_norm_silu_tile.cuh"
#include "sums.cuh"

namespace ddpm_fast {
namespace cuda {

// To 1 ulp; exact for powers of two.
DDPM_FAST_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// To the last rounding or so, without the subroutine of a division or a root.
DDPM_FAST_HD float precise_reciprocal(float x) {
  const float y = reciprocal(x);
  return ScalarLanes::fma(ScalarLanes::fma(-x, y, 1.0f), y, y);
}
DDPM_FAST_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  const float y = 1.0f / std::sqrt(x);
#endif
  const float error = ScalarLanes::fma(-x * y, y, 1.0f);
  return error - error == 0.0f ? ScalarLanes::fma(0.5f * y, error, y) : y;  // of 0 and infinity
}

// sigmoid(z), z >= -87, to 2^-22 and what z log2(e) loses in rounding, |z| 2^-24: the core's takes
// three times as many instructions.
DDPM_FAST_HD float quick_sigmoid(float z) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -0x1.715476p+0f));
  return reciprocal(e + 1.0f);
#else
  return sigmoid<ScalarLanes>(z);
#endif
}

// core/group_norm_silu.h's silu and silu_derivative.
DDPM_FAST_HD float quick_silu(float z) {
  z = ScalarLanes::at_least(z, -87.0f);
  return z * quick_sigmoid(z);
}
DDPM_FAST_HD float quick_silu_derivative(float z) {
  z = ScalarLanes::at_most(ScalarLanes::at_least(z, -87.0f), 87.0f);
  const float s = quick_sigmoid(z);
  return s * ScalarLanes::fma(z, 1.0f - s, 1.0f);
}

#if defined(__CUDACC__)
template <int kSums>
__device__ __forceinline__ Sums<kSums> from_lane(int apart, const Sums<kSums>& x) {
  Sums<kSums> other;
  DDPM_FAST_UNROLL
  for (int k = 0; k < kSums; ++k) other.of[k] = from_lane(apart, x.of[k]);
  return other;
}

// The lanes that lead have what those of their channels add up to, in a block of up to kMostWarps
// of whose lanes up to kMostLanes lie along channels.
template <class Layout, int kMostWarps = kWarps, int kMostLanes = kWarp, class Part>
__device__ __forceinline__ void add_threads(const GroupTiles& tiles, Part& part) {
  const int last = tiles.to();
#pragma unroll 1
  for (int apart = tiles.from(); apart >= last; apart /= 2) part += from_lane(apart, part);
  if constexpr (Layout::kPixels == 1) {
    if (!Layout::channels_last(tiles.channels_last)) return;  // a warp's channels are its own
    __shared__ Part of_warp[kMostWarps][kMostLanes];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane < last) of_warp[warp][lane] = part;
    __syncthreads();
    if (warp != 0 || lane >= last) return;
#pragma unroll 1
    for (int i = 1; i < tiles.warps; ++i) part += of_warp[i][lane];
  }
}

// Every lane of a warp, every thread of a block has what all of them add up to.
template <int kSums>
__device__ __forceinline__ void add_warp(Sums<kSums>& sums) {
  add_lanes(sums);
  DDPM_FAST_UNROLL
  for (int k = 0; k < kSums; ++k) sums.of[k] = __shfl_sync(0xFFFFFFFFu, sums.of[k], 0);
}
template <int kSums>
__device__ __forceinline__ void add_block(Sums<kSums>& sums) {
  __shared__ Sums<kSums> of_warp[kWarps];
  add_lanes(sums);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = of_warp[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) sums += of_warp[i];
}
#else
// parts: of all of a block's threads.
template <class Layout, class Part>
void add_threads(const GroupTiles& tiles, Part* parts) {
  for (int apart = tiles.from(); apart >= tiles.to(); apart /= 2) {
    for (int warp = 0; warp < kWarp * tiles.warps; warp += kWarp) {
      for (int i = 0; i + apart < kWarp; ++i) parts[warp + i] += parts[warp + i + apart];
    }
  }
  if (!Layout::channels_last(tiles.channels_last)) return;
  for (int i = 1; i < tiles.warps; ++i) {
    for (int lane = 0; lane < tiles.to(); ++lane) parts[lane] += parts[i * kWarp + lane];
  }
}
template <int kSums>
Sums<kSums> add_block(const Sums<kSums>* threads, int count) {
  Sums<kSums> sums = add_lanes(threads);
  for (int i = kWarp; i < count; i += kWarp) sums += add_lanes(threads + i);
  return sums;
}
#endif

}  // namespace cuda
}  // namespace ddpm_fast
