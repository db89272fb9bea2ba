// The gradient of group_norm_silu in two passes: each channel's three sums, and with what Python
// makes of them the gradient itself. Formula: core/group_norm_silu.h. The first moves s and dy, the
// second s, dy, dsum where there is one, and dx.
#pragma once

#include "group_norm_silu_sums.cuh"

namespace ddpm_fast {
namespace cuda {

// What a thread's channels are to their elements.
template <int kChannels>
struct ChannelGradients {
  float centre[kChannels], slope[kChannels], offset[kChannels], rstd[kChannels];

  DDPM_FAST_HD ChannelGradients(const GroupNormSiluBwdParams& p, const GroupTiles& tiles,
                                uint32_t n, uint32_t channel) {
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      const int64_t group = n * p.shape.groups + tiles.by_group.quotient(channel + k);
      rstd[k] = p.rstd[group];
      const ChannelAffine affine = p.affine.at(n, channel + k, p.mean[group], rstd[k]);
      centre[k] = affine.centre, slope[k] = affine.slope, offset[k] = affine.offset;
    }
  }

  // dz and xhat of an element of channel k.
  DDPM_FAST_HD void of(int k, bool silu, float s, float dy, float& dz, float& x_hat) const {
    const float d = s - centre[k];
    x_hat = d * rstd[k];
    dz = silu ? dy * quick_silu_derivative(ScalarLanes::fma(d, slope[k], offset[k])) : dy;
  }
};

// The first kernel. Where a sample has one chunk its sums are the result, [3, samples, channels];
// else scratch, [samples, chunks, 3, channels], has them.
template <class Layout_>
struct GroupNormSiluSums {
  using Layout = Layout_;
  static constexpr int kMinBlocks = Layout::kChannels > 4 ? 3 : 4;
  static constexpr int kChannels = Layout::kChannels, kElements = Layout::kElements;
  using Part = Sums<3 * kChannels>;  // all of S1, all of S2, all of S3

  static DDPM_FAST_HD Part run(const GroupNormSiluBwdParams& p, const GroupTiles& tiles,
                               uint32_t tile, int thread) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    Part sums{};
    if (!lane.inside) return sums;
    const TensorStrides strides = strides_in(p.shape, p.s_strides);
    const TensorStrides dense = strides_in(p.shape, dense_strides(p.shape));
    const ChannelGradients<kChannels> channels(p, tiles, lane.n, lane.channel);
    for (uint32_t pixel = lane.first; pixel < lane.end; pixel += kInFlight * lane.step) {
      InFlight<Layout> s, dy;
      s.load(p.s, p.dtype, strides, tiles, lane, pixel);
      dy.load(p.dy, p.dtype, dense, tiles, lane, pixel);
      DDPM_FAST_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (!lane.holds(pixel, i)) continue;
        float a[kElements], b[kElements];
        Layout::unpack(s.of[i], p.dtype, a);
        Layout::unpack(dy.of[i], p.dtype, b);
        DDPM_FAST_UNROLL
        for (int j = 0; j < kElements; ++j) {
          const int k = j / Layout::kPixels;
          float dz, x_hat;
          channels.of(k, p.silu, a[j], b[j], dz, x_hat);
          sums.of[k] += dz;
          sums.of[kChannels + k] = ScalarLanes::fma(dz, x_hat, sums.of[kChannels + k]);
          sums.of[2 * kChannels + k] += x_hat;
        }
      }
    }
    return sums;
  }

  static DDPM_FAST_HD void put(const GroupNormSiluBwdParams& p, const GroupTiles& tiles,
                               uint32_t tile, int thread, const Part& sums) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    const int64_t channels = p.shape.channels;
    if (!lane.leads) return;
    const bool whole = tiles.chunks == 1;
    float* to = whole ? p.sums + lane.n * channels
                      : p.scratch + 3 * channels * (lane.n * int64_t{tiles.chunks} + lane.chunk);
    const int64_t plane = whole ? p.shape.samples * channels : channels;
    DDPM_FAST_UNROLL
    for (int i = 0; i < 3; ++i) {
      store<Float32, kChannels>(to + i * plane + lane.channel, sums.of + i * kChannels);
    }
  }
};

// Between the two: a lane takes one sum of one channel, each warp of its block every fourth chunk.
struct GroupNormSiluSumsFinish {
  static DDPM_FAST_HD int64_t sums_of_sample(const GroupNormSiluBwdParams& p) {
    return 3 * p.shape.channels;
  }
  // Of the i-th of a sample's sums.
  static DDPM_FAST_HD Sums<1> run(const GroupNormSiluBwdParams& p, int64_t n, int64_t i, int warp) {
    Sums<1> sum{};
    if (i >= sums_of_sample(p)) return sum;
    const float* share = p.scratch + n * p.chunks * sums_of_sample(p) + i;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
    for (int64_t chunk = warp; chunk < p.chunks; chunk += kWarps) {
      sum.of[0] += share[chunk * sums_of_sample(p)];
    }
    return sum;
  }
  static DDPM_FAST_HD void put(const GroupNormSiluBwdParams& p, int64_t n, int64_t i,
                               const Sums<1>& sum) {
    if (i >= sums_of_sample(p)) return;
    const int64_t which = (i >= p.shape.channels) + (i >= 2 * p.shape.channels);
    const int64_t channel = i - which * p.shape.channels;
    p.sums[(which * p.shape.samples + n) * p.shape.channels + channel] = sum.of[0];
  }
};

// The second pass.
template <class Layout_>
struct GroupNormSiluBwd {
  using Layout = Layout_;
  static constexpr int kMinBlocks = Layout::kChannels > 4 ? 3 : 4;
  static constexpr int kChannels = Layout::kChannels, kElements = Layout::kElements;

  static DDPM_FAST_HD void run(const GroupNormSiluBwdParams& p, const GroupTiles& tiles,
                               uint32_t tile, int thread) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    if (!lane.inside) return;
    const TensorStrides strides = strides_in(p.shape, p.s_strides);
    const TensorStrides dense = strides_in(p.shape, dense_strides(p.shape));
    const ChannelGradients<kChannels> channels(p, tiles, lane.n, lane.channel);
    float by_dz[kChannels], by_x_hat[kChannels];  // rstd m1, rstd m2
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      const int64_t group = lane.n * p.shape.groups + tiles.by_group.quotient(lane.channel + k);
      by_dz[k] = channels.rstd[k] * p.group_means[group];
      by_x_hat[k] = channels.rstd[k] * p.group_means[p.shape.samples * p.shape.groups + group];
    }
    for (uint32_t pixel = lane.first; pixel < lane.end; pixel += kInFlight * lane.step) {
      InFlight<Layout> s, dy, dsum;
      s.load(p.s, p.dtype, strides, tiles, lane, pixel);
      dy.load(p.dy, p.dtype, dense, tiles, lane, pixel);
      if (p.dsum != nullptr) dsum.load(p.dsum, p.dtype, dense, tiles, lane, pixel);
      DDPM_FAST_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (!lane.holds(pixel, i)) continue;
        float a[kElements], b[kElements];
        Layout::unpack(s.of[i], p.dtype, a);
        Layout::unpack(dy.of[i], p.dtype, b);
        DDPM_FAST_UNROLL
        for (int j = 0; j < kElements; ++j) {
          const int k = j / Layout::kPixels;
          float dz, x_hat;
          channels.of(k, p.silu, a[j], b[j], dz, x_hat);
          const float rest = ScalarLanes::fma(x_hat, by_x_hat[k], by_dz[k]);
          a[j] = ScalarLanes::fma(dz, channels.slope[k], -rest);
        }
        if (p.dsum != nullptr) {
          Layout::unpack(dsum.of[i], p.dtype, b);
          DDPM_FAST_UNROLL
          for (int j = 0; j < kElements; ++j) a[j] += b[j];
        }
        Layout::store(p.dx, p.dtype, lane.at(tiles, dense, pixel + i * lane.step),
                      Layout::pack(a, p.dtype));
      }
    }
  }
};

// visit(layout) for the one that takes this problem: in the first pass without dsum and dx.
template <class Visit>
void visit_group_norm_silu_bwd(const GroupNormSiluBwdParams& p, const Visit& visit) {
  const PixelStrides dense = dense_strides(p.shape);
  const auto reached = [&](auto layout) {
    using Layout = decltype(layout);
    return vectors_reach<Layout>(p.s, p.shape, p.s_strides) &&
           vectors_reach<Layout>(p.dy, p.shape, dense) &&
           vectors_reach<Layout>(p.dsum, p.shape, dense) &&
           vectors_reach<Layout>(p.dx, p.shape, dense) && aligned(p.sums) && aligned(p.scratch);
  };
  visit_vectors(p.shape, p.dtype, p.chunk, reached, visit);
}

}  // namespace cuda
}  // namespace ddpm_fast
