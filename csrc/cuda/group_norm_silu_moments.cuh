// The first of group_norm_silu's kernels: moments of each channel of a chunk.
#pragma once

#include "group_norm_silu_sums.cuh"

namespace ddpm_fast {
namespace cuda {

// Of one chunk's pixels, channel by channel: their mean, and their sum of squares about it.
template <int kChannels_>
struct ChannelMoments {
  static constexpr int kChannels = kChannels_;
  float count, mean[kChannels], squares[kChannels];

  // What two sets of pixels come to (Chan, Golub & LeVeque 1979).
  DDPM_FAST_HD void operator+=(const ChannelMoments& other) {
    const float total = count + other.count;
    const float weight = total > 0.0f ? other.count * reciprocal(total) : 0.0f;
    const float spread = count * weight;
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      const float delta = other.mean[k] - mean[k];
      mean[k] = ScalarLanes::fma(delta, weight, mean[k]);
      // No spread is none of any delta, whose square may be infinite
      squares[k] = ScalarLanes::fma(delta, delta * spread, squares[k] + other.squares[k]);
    }
    count = total;
  }
};

#if defined(__CUDACC__)
template <int kChannels>
__device__ __forceinline__ ChannelMoments<kChannels> from_lane(int apart,
                                                               const ChannelMoments<kChannels>& x) {
  ChannelMoments<kChannels> other;
  other.count = from_lane(apart, x.count);
  DDPM_FAST_UNROLL
  for (int k = 0; k < kChannels; ++k) {
    other.mean[k] = from_lane(apart, x.mean[k]);
    other.squares[k] = from_lane(apart, x.squares[k]);
  }
  return other;
}
#endif

// The first kernel. Its scratch is [samples, chunks, channels, 2].
template <class Layout_>
struct GroupNormSiluMoments {
  using Layout = Layout_;
  using Part = ChannelMoments<Layout::kChannels>;
  static constexpr int kMinBlocks = 5;
  static constexpr int kChannels = Layout::kChannels, kElements = Layout::kElements;

  static DDPM_FAST_HD Part run(const GroupNormSiluParams& p, const GroupTiles& tiles, uint32_t tile,
                               int thread) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    Part moments{};
    if (!lane.inside) return moments;
    const TensorStrides x_strides = strides_in(p.shape, p.x_strides);
    for (uint32_t pixel = lane.first; pixel < lane.end; pixel += kInFlight * lane.step) {
      InFlight<Layout> x;
      x.load(p.x, p.dtype, x_strides, tiles, lane, pixel);
      if (p.residual != nullptr) add_residual(p, tiles, lane, pixel, x);
      moments += of_vectors(p.dtype, lane, pixel, x);
    }
    return moments;
  }

  static DDPM_FAST_HD void put(const GroupNormSiluParams& p, const GroupTiles& tiles, uint32_t tile,
                               int thread, const Part& moments) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    if (!lane.leads) return;
    float share[2 * kChannels];
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      share[2 * k] = moments.mean[k], share[2 * k + 1] = moments.squares[k];
    }
    const int64_t i = (static_cast<int64_t>(lane.n) * tiles.chunks + lane.chunk) * p.shape.channels;
    store<Float32, 2 * kChannels>(p.scratch + 2 * (i + lane.channel), share);
  }

  // s in the place of x, as it lies in memory, there too.
  static DDPM_FAST_HD void add_residual(const GroupNormSiluParams& p, const GroupTiles& tiles,
                                        const GroupLane<Layout>& lane, uint32_t pixel,
                                        InFlight<Layout>& x) {
    InFlight<Layout> residual;
    residual.load(p.residual, p.dtype, strides_in(p.shape, p.residual_strides), tiles, lane, pixel);
    const TensorStrides strides = strides_in(p.shape, p.sum_strides);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!lane.holds(pixel, i)) continue;
      float a[kElements], b[kElements];
      Layout::unpack(x.of[i], p.dtype, a);
      Layout::unpack(residual.of[i], p.dtype, b);
      DDPM_FAST_UNROLL
      for (int j = 0; j < kElements; ++j) a[j] += b[j];
      x.of[i] = Layout::pack(a, p.dtype);
      Layout::store(p.sum_out, p.dtype, lane.at(tiles, strides, pixel + i * lane.step), x.of[i]);
    }
  }

  // In two passes over what the thread has in registers.
  static DDPM_FAST_HD Part of_vectors(DType dtype, const GroupLane<Layout>& lane, uint32_t pixel,
                                      const InFlight<Layout>& x) {
    Part part{};
    DDPM_FAST_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!lane.holds(pixel, i)) continue;
      float values[kElements];
      Layout::unpack(x.of[i], dtype, values);
      part.count += Layout::kPixels;
      add_pixels(values, part.mean);
    }
    const float each = reciprocal(part.count);
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) part.mean[k] *= each;
    DDPM_FAST_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!lane.holds(pixel, i)) continue;
      float values[kElements];
      Layout::unpack(x.of[i], dtype, values);
      DDPM_FAST_UNROLL
      for (int j = 0; j < kElements; ++j) {
        const float d = values[j] - part.mean[j / Layout::kPixels];
        values[j] = d * d;
      }
      add_pixels(values, part.squares);
    }
    return part;
  }

  // Pixels of one channel in pairs, so that few wait for one another.
  static DDPM_FAST_HD void add_pixels(float (&values)[kElements], float (&sums)[kChannels]) {
    DDPM_FAST_UNROLL
    for (int apart = Layout::kPixels / 2; apart > 0; apart /= 2) {
      DDPM_FAST_UNROLL
      for (int j = 0; j < apart; ++j) values[j] += values[j + apart];
    }
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) sums[k] += values[k];
  }
};

}  // namespace cuda
}  // namespace ddpm_fast
