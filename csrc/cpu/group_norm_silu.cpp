#include <vector>

#include "group_norm.h"
#include "kernels.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

// x and residual added into sum_out, `size` values that follow one another.
template <class Type>
void add_residual(const typename Type::Element* x, const typename Type::Element* residual,
                  typename Type::Element* sum, int64_t size) {
  for_each_block<kBlock>(size, [&](auto block, int64_t i, int64_t count) DDPM_FAST_INLINE {
    using Values = Block<Type, decltype(block)::value>;
    const auto total = Values::load(x + i, count) + Values::load(residual + i, count);
    Values::store(sum + i, count, total);
  });
}

// y = silu(fma(s - centre, slope, offset)) of values whose coefficients lie beside one another.
template <class Type, bool kSilu>
DDPM_FAST_HD void normalise(const typename Type::Element* s, typename Type::Element* y,
                            int64_t size, const float* centre, const float* slope,
                            const float* offset) {
  for_each_block<kPack>(size, [&](auto block, int64_t i, int64_t count) DDPM_FAST_INLINE {
    using Values = Block<Type, decltype(block)::value>;
    using Whole = Block<Float32, Values::kVectors>;  // coefficients are padded to whole vectors
    using V = PackLanes<Values::kVectors>;
    auto z = V::fma(Values::load(s + i, count) - Whole::load(centre + i, 0),
                    Whole::load(slope + i, 0), Whole::load(offset + i, 0));
    if (kSilu) z = silu<V>(z);
    Values::store(y + i, count, z);
  });
}

// The same where all have one channel's.
template <class Type, bool kSilu>
DDPM_FAST_HD void normalise(const typename Type::Element* s, typename Type::Element* y,
                            int64_t size, const ChannelAffine& c) {
  for_each_block<kPack>(size, [&](auto block, int64_t i, int64_t count) DDPM_FAST_INLINE {
    using Values = Block<Type, decltype(block)::value>;
    using V = PackLanes<Values::kVectors>;
    auto z = V::fma(Values::load(s + i, count) - V::splat(c.centre), V::splat(c.slope),
                    V::splat(c.offset));
    if (kSilu) z = silu<V>(z);
    Values::store(y + i, count, z);
  });
}

// 1 / sqrt(var + eps) of a group's sum of squares about its mean; written down if `tells`.
void finish(const GroupNormSiluParams& p, int64_t n, int64_t group, bool tells,
            const Moments& found, float& mean, float& rstd) {
  mean = static_cast<float>(found.mean);
  rstd = static_cast<float>(1.0 / __builtin_sqrt(found.squares / found.count + p.eps));
  if (!tells || p.mean == nullptr) return;
  p.mean[n * p.shape.groups + group] = mean;
  p.rstd[n * p.shape.groups + group] = rstd;
}

// A unit is a sample, a chunk some of its pixels. Moments are kept for each channel, so that
// vectors are whole whatever a group's channels are: scratch is [samples, chunks, 2, channels]
// here.
template <class Type, bool kSilu>
class ChannelsLast {
  using Element = typename Type::Element;

 public:
  explicit ChannelsLast(const GroupNormSiluParams& p)
      : p_(p),
        channels_(p.shape.channels),
        padded_((channels_ + kWidth - 1) / kWidth * kWidth),
        coefficients_(static_cast<size_t>(3 * padded_)),
        moments_(static_cast<size_t>(2 * channels_)),
        cols_(p.shape.cols) {
    const bool one_row = joined(p.shape, p.x_strides) && joined(p.shape, p.y_strides) &&
                         (p.residual == nullptr ||
                          (joined(p.shape, p.residual_strides) && joined(p.shape, p.sum_strides)));
    if (one_row) cols_ = p.shape.pixels();
    source_ = p.residual != nullptr ? p.sum_out : p.x;
    strides_ = p.residual != nullptr ? p.sum_strides : p.x_strides;
  }

  // Two passes over a chunk, the second of which finds it in the first-level cache: its mean, and
  // the squares about it, with what rounding left of the mean taken out again. Values whose squares
  // are infinite have an infinite sum of them, as infinity + fma's exact product is.
  void first(int64_t n, int64_t chunk) const {
    const Pixels pixels = pixels_of(chunk);
    if (p_.residual != nullptr) add(n, pixels);
    const Element* s = at<Element>(source_, n * strides_.sample);
    const float share = 1.0f / static_cast<float>(pixels.end - pixels.begin);
    float* means = scratch(n, chunk);
    for_each_block<kBlock>(channels_, [&](auto block, int64_t c, int64_t some) {
      using Values = Block<Type, decltype(block)::value>;
      using Whole = Block<Float32, decltype(block)::value>;
      using V = PackLanes<Values::kVectors>;
      typename V::F sum = {}, of_d = {}, of_d2 = {};
      for_each_pixel(s + c, pixels, [&](const Element* from) DDPM_FAST_INLINE {
        sum = sum + Values::load(from, some);
      });
      const auto mean = sum * V::splat(share);
      for_each_pixel(s + c, pixels, [&](const Element* from) DDPM_FAST_INLINE {
        const auto d = Values::load(from, some) - mean;
        of_d = of_d + d;
        of_d2 = V::fma(d, d, of_d2);
      });
      const auto shift = of_d * V::splat(share);
      Whole::store(means + c, some, mean + shift);
      Whole::store(means + channels_ + c, some, V::fma(-of_d, shift, of_d2));
    });
  }

  void start(int64_t n, bool tells) {
    const GroupNormShape& shape = p_.shape;
    const int64_t each = shape.group_channels();
    const double pixels = static_cast<double>(shape.pixels());
    double *means = moments_.data(), *squares = means + channels_;
    combine(n, means, squares);
    float *centre = coefficients_.data(), *slope = centre + padded_, *offset = slope + padded_;
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t begin = g * each, end = begin + each;
      Moments group;
      group.count = pixels * each;
      for (int64_t c = begin; c < end; ++c) {
        means[c] += p_.affine.emb_at(n, c);
        group.mean += means[c] / each;
      }
      for (int64_t c = begin; c < end; ++c) {
        const double delta = means[c] - group.mean;
        group.squares += squares[c] + pixels * delta * delta;
      }
      float mean, rstd;
      finish(p_, n, g, tells, group, mean, rstd);
      for (int64_t c = begin; c < end; ++c) {
        const ChannelAffine affine = p_.affine.at(n, c, mean, rstd);
        centre[c] = affine.centre, slope[c] = affine.slope, offset[c] = affine.offset;
      }
    }
  }

  void second(int64_t n, int64_t chunk) const {
    const float *centre = coefficients_.data(), *slope = centre + padded_,
                *offset = slope + padded_;
    const Element* s = at<Element>(source_, n * strides_.sample);
    Element* y = static_cast<Element*>(p_.y) + n * p_.y_strides.sample;
    pixels_of(chunk).for_each_row([&](int64_t row, int64_t column, int64_t count) {
      const Element* from = row_of(s, strides_, row, column);
      Element* to = row_of(y, p_.y_strides, row, column);
      for (int64_t i = 0; i < count; ++i) {
        normalise<Type, kSilu>(from, to, channels_, centre, slope, offset);
        from += strides_.pixel;
        to += p_.y_strides.pixel;
      }
    });
  }

 private:
  Pixels pixels_of(int64_t chunk) const {
    const int64_t begin = chunk * p_.chunk;
    return {begin, std::min(begin + p_.chunk, p_.shape.pixels()), cols_};
  }
  float* scratch(int64_t n, int64_t chunk) const {
    return p_.scratch + (n * p_.chunks + chunk) * 2 * channels_;
  }

  void add(int64_t n, const Pixels& pixels) const {
    const Element* x = at<Element>(p_.x, n * p_.x_strides.sample);
    const Element* residual = at<Element>(p_.residual, n * p_.residual_strides.sample);
    Element* sum = static_cast<Element*>(p_.sum_out) + n * p_.sum_strides.sample;
    pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) {
      for (int64_t i = column; i < column + count; ++i) {
        add_residual<Type>(row_of(x, p_.x_strides, row, i),
                           row_of(residual, p_.residual_strides, row, i),
                           row_of(sum, p_.sum_strides, row, i), channels_);
      }
    });
  }

  // f(a pixel's values from `base` on).
  template <class F>
  DDPM_FAST_HD void for_each_pixel(const Element* base, const Pixels& pixels, const F& f) const {
    pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) DDPM_FAST_INLINE {
      const Element* from = row_of(base, strides_, row, column);
      for (int64_t i = 0; i < count; ++i, from += strides_.pixel) f(from);
    });
  }

  // The chunks' moments of each channel (Chan et al. 1979), in order, as core's Moments.
  void combine(int64_t n, double* means, double* squares) const {
    std::fill(means, means + 2 * channels_, 0.0);
    double count = 0;
    for (int64_t k = 0; k < p_.chunks; ++k) {
      const Pixels pixels = pixels_of(k);
      const double more = static_cast<double>(pixels.end - pixels.begin), total = count + more;
      const double share = more / total, weight = count * share;
      const float *chunk_means = scratch(n, k), *chunk_squares = chunk_means + channels_;
      for (int64_t c = 0; c < channels_; ++c) {
        const double delta = chunk_means[c] - means[c];
        means[c] += delta * share;
        squares[c] += chunk_squares[c] + delta * delta * weight;
      }
      count = total;
    }
  }

  const GroupNormSiluParams& p_;
  int64_t channels_, padded_;
  std::vector<float> coefficients_;  // centre, slope and offset of each channel
  std::vector<double> moments_;
  int64_t cols_;
  const void* source_;
  PixelStrides strides_;
};

// A unit is a sample's group, all of whose elements follow one another; a chunk some of them.
template <class Type, bool kSilu>
class Dense {
  using Element = typename Type::Element;

 public:
  explicit Dense(const GroupNormSiluParams& p)
      : p_(p), size_(p.shape.group_elements()), pixels_(p.shape.pixels()) {
    source_ = p.residual != nullptr ? p.sum_out : p.x;
  }

  void first(int64_t unit, int64_t chunk) {
    const int64_t base = unit * size_, n = unit / p_.shape.groups;
    const int64_t begin = chunk * p_.chunk, end = std::min(begin + p_.chunk, size_);
    if (p_.residual != nullptr) {
      add_residual<Type>(at<Element>(p_.x, base + begin), at<Element>(p_.residual, base + begin),
                         static_cast<Element*>(p_.sum_out) + base + begin, end - begin);
    }
    const double count = static_cast<double>(end - begin);
    const Element* s = at<Element>(source_, base);
    Places sum = {};
    double of_emb = 0;
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) DDPM_FAST_INLINE {
      of_emb += static_cast<double>(p_.affine.emb_at(n, c)) * some;
      for_each_places(some, [&](auto block, int64_t j, int64_t rest) DDPM_FAST_INLINE {
        sum = sum + load_places<Type, decltype(block)::value>(s + i + j, rest);
      });
    });
    const float guess = static_cast<float>((total(sum) + of_emb) / count);
    Places of_d = {}, of_d2 = {};
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) DDPM_FAST_INLINE {
      const auto centre = V::splat(guess - p_.affine.emb_at(n, c));
      for_each_places(some, [&](auto block, int64_t j, int64_t rest) DDPM_FAST_INLINE {
        Places d = load_places<Type, decltype(block)::value>(s + i + j, rest) - centre;
        if (decltype(block)::value == 0) d = only_before(rest, d);
        of_d = of_d + d;
        of_d2 = V::fma(d, d, of_d2);
      });
    });
    const double found = total(of_d);
    float* moments = p_.scratch + (unit * p_.chunks + chunk) * 2;
    moments[0] = static_cast<float>(guess + found / count);
    moments[1] = static_cast<float>(total(of_d2) - found * found / count);
  }

  void start(int64_t unit, bool tells) {
    Moments group;
    for (int64_t k = 0; k < p_.chunks; ++k) {
      const float* moments = p_.scratch + (unit * p_.chunks + k) * 2;
      const int64_t count = std::min(p_.chunk, size_ - k * p_.chunk);
      group.add(static_cast<double>(count), moments[0], moments[1]);
    }
    finish(p_, unit / p_.shape.groups, unit % p_.shape.groups, tells, group, mean_, rstd_);
  }

  void second(int64_t unit, int64_t chunk) {
    const int64_t base = unit * size_, n = unit / p_.shape.groups;
    const int64_t begin = chunk * p_.chunk, end = std::min(begin + p_.chunk, size_);
    const Element* s = at<Element>(source_, base);
    Element* y = static_cast<Element*>(p_.y) + base;
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) DDPM_FAST_INLINE {
      normalise<Type, kSilu>(s + i, y + i, some, p_.affine.at(n, c, mean_, rstd_));
    });
  }

 private:
  using V = PlaceLanes;

  // f(channel, first, count) for elements [begin, end) of a group, a channel at a time.
  template <class F>
  DDPM_FAST_HD void for_each_channel(int64_t unit, int64_t begin, int64_t end, const F& f) const {
    const int64_t first = unit % p_.shape.groups * p_.shape.group_channels();
    for (int64_t i = begin; i < end;) {
      const int64_t c = i / pixels_, count = std::min(end, (c + 1) * pixels_) - i;
      f(first + c, i, count);
      i += count;
    }
  }

  const GroupNormSiluParams& p_;
  int64_t size_, pixels_;
  const void* source_;
  float mean_ = 0, rstd_ = 0;
};

template <class Type, bool kSilu>
void run(const GroupNormSiluParams& p, int threads) {
  const int64_t elements = p.shape.samples * p.shape.channels * p.shape.pixels();
  if (p.shape.channels_last) {
    for_each_unit(p.shape.samples, p.chunks, elements, threads,
                  [&] { return ChannelsLast<Type, kSilu>(p); });
  } else {
    for_each_unit(p.shape.samples * p.shape.groups, p.chunks, elements, threads,
                  [&] { return Dense<Type, kSilu>(p); });
  }
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p, int threads) {
  with_type(p.dtype, [&](auto type) {
    using Type = decltype(type);
    p.silu ? run<Type, true>(p, threads) : run<Type, false>(p, threads);
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
