// group_norm_silu in three kernels: each chunk's mean and sum of squares, channel by channel; a
// group's mean and rstd of them, and what each channel comes to; the result. Formula:
// core/group_norm_silu.h. Moves x twice and y once; with a residual, x, residual, s twice and y.
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
      squares[k] = ScalarLanes::fma(delta * delta, spread, squares[k] + other.squares[k]);
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
    if (lane.channel >= p.shape.channels) return moments;
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
    if (!lane.leads || lane.channel >= p.shape.channels) return;
    float share[2 * kChannels];
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      share[2 * k] = moments.mean[k], share[2 * k + 1] = moments.squares[k];
    }
    const int64_t i = (static_cast<int64_t>(lane.n) * tiles.chunks + lane.chunk) * p.shape.channels;
    store<Float32, 2 * kChannels>(p.scratch + 2 * (i + lane.channel), share);
  }

 private:
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

// Past the moments scratch has what the third kernel reads: [3, samples, channels], the fields of
// ChannelAffine.
DDPM_FAST_HD float* affine_in(const GroupNormSiluParams& p) {
  return p.scratch + 2 * p.shape.samples * p.chunks * p.shape.channels;
}

// The second kernel: a block a group. Threads take every so many of its channels' moments.
struct GroupNormSiluFinish {
  // mean and rstd, where a group lies and who asks.
  struct Group {
    int64_t n, group, channels;  // channels: of the group
    int thread, threads;
    Divider by_channels;

    DDPM_FAST_HD Group(const GroupNormSiluParams& p, const Divider& by_channels, uint32_t block,
                       int thread, int threads)
        : channels(p.shape.group_channels()),
          thread(thread),
          threads(threads),
          by_channels(by_channels) {
      n = block / static_cast<uint32_t>(p.shape.groups);
      group = block - n * p.shape.groups;
    }
  };

  // sum of a chunk's pixels times its mean of u; then, about a mean, sums of differences and of
  // squares: what the first mean lacks, the first of them makes good.
  static DDPM_FAST_HD Sums<1> sum(const GroupNormSiluParams& p, const Group& at) {
    Sums<1> sums{};
    for_each(p, at, [&](float count, float mean, float) {
      sums.of[0] = ScalarLanes::fma(count, mean, sums.of[0]);
    });
    return sums;
  }
  static DDPM_FAST_HD Sums<2> sums_about(const GroupNormSiluParams& p, const Group& at,
                                         float about) {
    Sums<2> sums{};
    for_each(p, at, [&](float count, float mean, float squares) {
      const float d = mean - about;
      sums.of[0] = ScalarLanes::fma(count, d, sums.of[0]);
      sums.of[1] += ScalarLanes::fma(count * d, d, squares);
    });
    return sums;
  }

  static DDPM_FAST_HD void put(const GroupNormSiluParams& p, const Group& at, float about,
                               const Sums<2>& sums) {
    const float elements = static_cast<float>(p.shape.group_elements());
    const float lacks = sums.of[0] / elements, mean = about + lacks;
    const float variance = ScalarLanes::at_least(sums.of[1] / elements - lacks * lacks, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
    if (at.thread == 0 && p.mean != nullptr) {
      p.mean[at.n * p.shape.groups + at.group] = mean;
      p.rstd[at.n * p.shape.groups + at.group] = rstd;
    }
    float* affine = affine_in(p) + at.n * p.shape.channels;
    const int64_t plane = p.shape.samples * p.shape.channels;
    for (int64_t i = at.thread; i < at.channels; i += at.threads) {
      const int64_t c = at.group * at.channels + i;
      const ChannelAffine channel = p.affine.at(at.n, c, mean, rstd);
      affine[c] = channel.centre;
      affine[plane + c] = channel.slope;
      affine[2 * plane + c] = channel.offset;
    }
  }

 private:
  template <class Take>
  static DDPM_FAST_HD void for_each(const GroupNormSiluParams& p, const Group& at,
                                    const Take& take) {
    const float* moments =
        p.scratch + 2 * (at.n * p.chunks * p.shape.channels + at.group * at.channels);
    const uint32_t shares = static_cast<uint32_t>(p.chunks * at.channels);
    for (uint32_t i = at.thread; i < shares; i += at.threads) {
      const uint32_t chunk = at.by_channels.quotient(i);
      const int64_t channel = i - chunk * at.channels;
      const float* share = moments + 2 * (chunk * p.shape.channels + channel);
      const int64_t left = p.shape.pixels() - chunk * p.chunk;
      take(static_cast<float>(left < p.chunk ? left : p.chunk),
           share[0] + p.affine.emb_at(at.n, at.group * at.channels + channel), share[1]);
    }
  }
};

// The third kernel.
template <class Layout_>
struct GroupNormSiluApply {
  using Layout = Layout_;
  static constexpr int kMinBlocks = 5;
  static constexpr int kChannels = Layout::kChannels, kElements = Layout::kElements;

  static DDPM_FAST_HD void run(const GroupNormSiluParams& p, const GroupTiles& tiles, uint32_t tile,
                               int thread) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    if (lane.channel >= p.shape.channels) return;
    const bool summed = p.residual != nullptr;
    const void* from = summed ? p.sum_out : p.x;
    const TensorStrides strides = strides_in(p.shape, summed ? p.sum_strides : p.x_strides);
    const TensorStrides y_strides = strides_in(p.shape, p.y_strides);
    const float* affine = affine_in(p) + lane.n * p.shape.channels + lane.channel;
    const int64_t plane = p.shape.samples * p.shape.channels;
    float centre[kChannels], slope[kChannels], offset[kChannels];
    load<Float32, kChannels>(affine, centre);
    load<Float32, kChannels>(affine + plane, slope);
    load<Float32, kChannels>(affine + 2 * plane, offset);
    for (uint32_t pixel = lane.first; pixel < lane.end; pixel += kInFlight * lane.step) {
      InFlight<Layout> s;
      s.load(from, p.dtype, strides, tiles, lane, pixel);
      DDPM_FAST_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (!lane.holds(pixel, i)) continue;
        float values[kElements];
        Layout::unpack(s.of[i], p.dtype, values);
        DDPM_FAST_UNROLL
        for (int j = 0; j < kElements; ++j) {
          const int k = j / Layout::kPixels;
          values[j] = ScalarLanes::fma(values[j] - centre[k], slope[k], offset[k]);
        }
        if (p.silu) {
          DDPM_FAST_UNROLL
          for (int j = 0; j < kElements; ++j) values[j] = quick_silu(values[j]);
        }
        Layout::store(p.y, p.dtype, lane.at(tiles, y_strides, pixel + i * lane.step),
                      Layout::pack(values, p.dtype));
      }
    }
  }
};

// visit(layout) for the one that takes this problem, in all of its kernels.
template <class Visit>
void visit_group_norm_silu(const GroupNormSiluParams& p, const Visit& visit) {
  const auto reached = [&](auto layout) {
    using Layout = decltype(layout);
    return vectors_reach<Layout>(p.x, p.shape, p.x_strides) &&
           vectors_reach<Layout>(p.residual, p.shape, p.residual_strides) &&
           vectors_reach<Layout>(p.sum_out, p.shape, p.sum_strides) &&
           vectors_reach<Layout>(p.y, p.shape, p.y_strides) && aligned(p.scratch);
  };
  visit_vectors(p.shape, p.dtype, p.chunk, reached, visit);
}

}  // namespace cuda
}  // namespace ddpm_fast
