// group_norm_silu in three kernels: each chunk's mean and sum of squares, channel by channel; a
// group's mean and rstd of them, and what each channel comes to; the result. Formula:
// core/group_norm_silu.h. Moves x twice and y once; with a residual, x, residual, s twice and y.
// Groups that a block can hold take one kernel: group_norm_silu_whole.cuh.
#pragma once

#include "group_norm_silu_moments.cuh"

namespace ddpm_fast {
namespace cuda {

// Past the moments scratch has what the third kernel reads: [3, samples, channels], the fields of
// ChannelAffine.
DDPM_FAST_HD float* affine_in(const GroupNormSiluParams& p) {
  return p.scratch + 2 * p.shape.samples * p.chunks * p.shape.channels;
}

// Some threads that take every so many of a group's moments: where these lie, of the group's first
// channel; where what its channels come to goes, a plane a field.
struct GroupOfThreads {
  int64_t n, group, channels;  // channels: of a group
  const float* moments;        // [chunks, stride, 2]
  int64_t stride, chunks, chunk;
  float* affine;
  int64_t plane;
  Divider by_channels;
  int thread, threads;
};

// The second kernel: a block a group. kAtOnce: moments that a thread asks for before it adds any
// up.
template <int kAtOnce>
struct GroupNormSiluFinish {
  static DDPM_FAST_HD GroupOfThreads place(const GroupNormSiluParams& p, uint32_t channels,
                                           const Divider& by_channels, uint32_t block, int thread,
                                           int threads) {
    const uint32_t groups = static_cast<uint32_t>(p.shape.groups);
    const int64_t n = block / groups, all = p.shape.channels, group = block - n * groups;
    const float* moments = p.scratch + 2 * (n * p.chunks * all + group * channels);
    float* affine = affine_in(p) + n * all + group * channels;
    return {n,           group,  channels,
            moments,     all,    p.chunks,
            p.chunk,     affine, p.shape.samples * all,
            by_channels, thread, threads};
  }

  // sum of a chunk's pixels times its mean of u; then, about a mean, sums of differences and of
  // squares: what the first mean lacks, the first of them makes good.
  static DDPM_FAST_HD Sums<1> sum(const GroupNormSiluParams& p, const GroupOfThreads& at) {
    Sums<1> sums{};
    for_each(p, at, [&](float count, float mean, float) {
      sums.of[0] = ScalarLanes::fma(count, mean, sums.of[0]);
    });
    return sums;
  }
  static DDPM_FAST_HD float mean(const GroupNormSiluParams& p, const GroupOfThreads& at,
                                 const Sums<1>& sum) {
    return sum.of[0] * each(p, at);
  }
  static DDPM_FAST_HD Sums<2> sums_about(const GroupNormSiluParams& p, const GroupOfThreads& at,
                                         float about) {
    Sums<2> sums{};
    for_each(p, at, [&](float count, float mean, float squares) {
      const float d = mean - about;
      sums.of[0] = ScalarLanes::fma(count, d, sums.of[0]);
      sums.of[1] += ScalarLanes::fma(count * d, d, squares);
    });
    return sums;
  }

  static DDPM_FAST_HD void put(const GroupNormSiluParams& p, const GroupOfThreads& at, float about,
                               const Sums<2>& sums) {
    const float lacks = sums.of[0] * each(p, at), mean = about + lacks;
    const float squares = sums.of[1] * each(p, at);  // may be infinite
    const float variance = ScalarLanes::at_least(ScalarLanes::fma(-lacks, lacks, squares), 0.0f);
    const float rstd = reciprocal_root(variance + p.eps);
    if (at.thread == 0 && p.mean != nullptr) {
      p.mean[at.n * p.shape.groups + at.group] = mean;
      p.rstd[at.n * p.shape.groups + at.group] = rstd;
    }
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int64_t i = at.thread; i < at.channels; i += at.threads) {
      const ChannelAffine channel = p.affine.at(at.n, at.group * at.channels + i, mean, rstd);
      at.affine[i] = channel.centre;
      at.affine[at.plane + i] = channel.slope;
      at.affine[2 * at.plane + i] = channel.offset;
    }
  }

 private:
  static DDPM_FAST_HD float each(const GroupNormSiluParams& p, const GroupOfThreads& at) {
    return precise_reciprocal(static_cast<float>(at.channels * p.shape.pixels()));
  }

  template <class Take>
  static DDPM_FAST_HD void for_each(const GroupNormSiluParams& p, const GroupOfThreads& at,
                                    const Take& take) {
    const uint32_t shares = static_cast<uint32_t>(at.chunks * at.channels);
#if defined(__CUDA_ARCH__)
#pragma unroll kAtOnce
#endif
    for (uint32_t i = at.thread; i < shares; i += at.threads) {
      const uint32_t chunk = at.by_channels.quotient(i);
      const int64_t channel = i - chunk * at.channels;
      const float* share = at.moments + 2 * (chunk * at.stride + channel);
      const int64_t left = p.shape.pixels() - chunk * at.chunk;
      take(static_cast<float>(left < at.chunk ? left : at.chunk),
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
    if (!lane.inside) return;
    const bool summed = p.residual != nullptr;
    const void* from = summed ? p.sum_out : p.x;
    const TensorStrides strides = strides_in(p.shape, summed ? p.sum_strides : p.x_strides);
    const int64_t plane = p.shape.samples * p.shape.channels;
    const Affine affine(affine_in(p) + lane.n * p.shape.channels + lane.channel, plane);
    for (uint32_t pixel = lane.first; pixel < lane.end; pixel += kInFlight * lane.step) {
      InFlight<Layout> s;
      s.load(from, p.dtype, strides, tiles, lane, pixel);
      put(p, tiles, lane, pixel, affine, s);
    }
  }

  // Of a thread's channels.
  struct Affine {
    float centre[kChannels], slope[kChannels], offset[kChannels];

    DDPM_FAST_HD Affine(const float* planes, int64_t plane) {
      load<Float32, kChannels>(planes, centre);
      load<Float32, kChannels>(planes + plane, slope);
      load<Float32, kChannels>(planes + 2 * plane, offset);
    }
  };

  static DDPM_FAST_HD void put(const GroupNormSiluParams& p, const GroupTiles& tiles,
                               const GroupLane<Layout>& lane, uint32_t pixel, const Affine& affine,
                               const InFlight<Layout>& s) {
    const TensorStrides strides = strides_in(p.shape, p.y_strides);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!lane.holds(pixel, i)) continue;
      float values[kElements];
      Layout::unpack(s.of[i], p.dtype, values);
      DDPM_FAST_UNROLL
      for (int j = 0; j < kElements; ++j) {
        const int k = j / Layout::kPixels;
        const float centred = values[j] - affine.centre[k];
        values[j] = ScalarLanes::fma(centred, affine.slope[k], affine.offset[k]);
      }
      if (p.silu) {
        DDPM_FAST_UNROLL
        for (int j = 0; j < kElements; ++j) values[j] = quick_silu(values[j]);
      }
      Layout::store(p.y, p.dtype, lane.at(tiles, strides, pixel + i * lane.step),
                    Layout::pack(values, p.dtype));
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
