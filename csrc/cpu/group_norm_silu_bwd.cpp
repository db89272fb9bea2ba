#include <vector>

#include "group_norm.h"
#include "kernels.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

// dz = dy silu'(z), or dy.
template <class V, bool kSilu>
DDPM_FAST_HD typename V::F dz_of(typename V::F dy, typename V::F d, typename V::F slope,
                                 typename V::F offset) {
  if constexpr (!kSilu) return dy;
  return dy * silu_derivative<V>(V::fma(d, slope, offset));
}

// rstd (dz A - m1 - xhat m2), d = s - centre, as dz slope - (d twist + level).
struct Gradient {
  float level, twist;

  Gradient(const GroupNormSiluBwdParams& p, int64_t n, int64_t group) {
    const int64_t at = n * p.shape.groups + group;
    const float rstd = p.rstd[at];
    level = -rstd * p.group_means[at];
    twist = -rstd * rstd * p.group_means[p.shape.samples * p.shape.groups + at];
  }
};

// What the kernels know of a channel.
ChannelAffine affine_of(const GroupNormSiluBwdParams& p, int64_t n, int64_t c) {
  const int64_t at = n * p.shape.groups + c / p.shape.group_channels();
  return p.affine.at(n, c, p.mean[at], p.rstd[at]);
}

// The chunks' sums of each channel, in order; those over d become those over xhat.
void add_up_chunks(const GroupNormSiluBwdParams& p, int64_t n, int64_t first, int64_t end) {
  const int64_t channels = p.shape.channels, each = p.shape.group_channels();
  for (int s = 0; s < 3; ++s) {
    for (int64_t c = first; c < end; c += 64) {
      const int64_t count = std::min<int64_t>(64, end - c);
      double sums[64] = {};
      for (int64_t k = 0; k < p.chunks; ++k) {
        const float* shares = p.scratch + ((n * p.chunks + k) * 3 + s) * channels + c;
        for (int64_t i = 0; i < count; ++i) sums[i] += shares[i];
      }
      float* out = p.sums + (s * p.shape.samples + n) * channels + c;
      for (int64_t i = 0; i < count; ++i) {
        const double rstd = p.rstd[n * p.shape.groups + (c + i) / each];
        out[i] = static_cast<float>(s > 0 ? sums[i] * rstd : sums[i]);
      }
    }
  }
}

// A unit is a sample, a chunk some of its pixels.
template <class Type, bool kSilu>
class ChannelsLast {
 protected:
  using Element = typename Type::Element;

  explicit ChannelsLast(const GroupNormSiluBwdParams& p)
      : p_(p),
        channels_(p.shape.channels),
        padded_((channels_ + kWidth - 1) / kWidth * kWidth),
        coefficients_(static_cast<size_t>(5 * padded_)),
        cols_(joined(p.shape, p.s_strides) ? p.shape.pixels() : p.shape.cols) {}

  float* row(int i) { return coefficients_.data() + i * padded_; }

  void prepare_affine(int64_t n) {
    for (int64_t c = 0; c < channels_; ++c) {
      const ChannelAffine affine = affine_of(p_, n, c);
      row(0)[c] = affine.centre, row(1)[c] = affine.slope, row(2)[c] = affine.offset;
    }
  }

  // f(a pixel's values of s, its first place in the dense tensors).
  template <class F>
  DDPM_FAST_HD void for_each_pixel(int64_t n, int64_t chunk, const F& f) const {
    const int64_t begin = chunk * p_.chunk, all = p_.shape.pixels();
    const Pixels pixels{begin, std::min(begin + p_.chunk, all), cols_};
    const Element* s = at<Element>(p_.s, n * p_.s_strides.sample);
    int64_t dense = (n * all + begin) * channels_;
    pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) DDPM_FAST_INLINE {
      const Element* from = row_of(s, p_.s_strides, row, column);
      for (int64_t i = 0; i < count; ++i) {
        f(from, dense);
        from += p_.s_strides.pixel;
        dense += channels_;
      }
    });
  }

  const GroupNormSiluBwdParams& p_;
  int64_t channels_, padded_;
  std::vector<float> coefficients_;  // centre, slope, offset; level and twist
  int64_t cols_, prepared_ = -1;
};

template <class Type, bool kSilu>
class SumsChannelsLast : ChannelsLast<Type, kSilu> {
  using Base = ChannelsLast<Type, kSilu>;
  using typename Base::Element;

 public:
  explicit SumsChannelsLast(const GroupNormSiluBwdParams& p) : Base(p) {}

  void first(int64_t n, int64_t chunk) {
    if (n != this->prepared_) this->prepare_affine(n), this->prepared_ = n;
    const GroupNormSiluBwdParams& p = this->p_;
    const float *centre = this->row(0), *slope = this->row(1), *offset = this->row(2);
    float* sums = p.scratch + (n * p.chunks + chunk) * 3 * this->channels_;
    for_each_block<2>(this->channels_, [&](auto block, int64_t c, int64_t some) DDPM_FAST_INLINE {
      using Values = Block<Type, decltype(block)::value>;
      using Whole = Block<Float32, decltype(block)::value>;
      using Padded = Block<Float32, Values::kVectors>;
      using V = PackLanes<Values::kVectors>;
      typename V::F of_dz = {}, of_dz_d = {}, of_d = {};
      const auto middle = Padded::load(centre + c, 0), slopes = Padded::load(slope + c, 0);
      const auto offsets = Padded::load(offset + c, 0);
      this->for_each_pixel(n, chunk, [&](const Element* s, int64_t dense) DDPM_FAST_INLINE {
        const auto d = Values::load(s + c, some) - middle;
        const auto dy = Values::load(at<Element>(p.dy, dense + c), some);
        const auto dz = dz_of<V, kSilu>(dy, d, slopes, offsets);
        of_dz = of_dz + dz;
        of_dz_d = V::fma(dz, d, of_dz_d);
        of_d = of_d + d;
      });
      Whole::store(sums + c, some, of_dz);
      Whole::store(sums + this->channels_ + c, some, of_dz_d);
      Whole::store(sums + 2 * this->channels_ + c, some, of_d);
    });
  }

  void start(int64_t n, bool tells) const {
    if (tells) add_up_chunks(this->p_, n, 0, this->channels_);
  }
  void second(int64_t, int64_t) const {}
};

template <class Type, bool kSilu>
class BwdChannelsLast : ChannelsLast<Type, kSilu> {
  using Base = ChannelsLast<Type, kSilu>;
  using typename Base::Element;

 public:
  explicit BwdChannelsLast(const GroupNormSiluBwdParams& p) : Base(p) {}

  void first(int64_t n, int64_t chunk) {
    if (n != this->prepared_) prepare(n);
    const GroupNormSiluBwdParams& p = this->p_;
    const float *centre = this->row(0), *slope = this->row(1), *offset = this->row(2);
    const float *level = this->row(3), *twist = this->row(4);
    const auto* dsum = static_cast<const Element*>(p.dsum);
    this->for_each_pixel(n, chunk, [&](const Element* s, int64_t dense) DDPM_FAST_INLINE {
      const Element* dy = at<Element>(p.dy, dense);
      Element* dx = static_cast<Element*>(p.dx) + dense;
      for_each_block<kPack>(
          this->channels_, [&](auto block, int64_t c, int64_t some) DDPM_FAST_INLINE {
            using Values = Block<Type, decltype(block)::value>;
            using Padded = Block<Float32, Values::kVectors>;
            using V = PackLanes<Values::kVectors>;
            const auto d = Values::load(s + c, some) - Padded::load(centre + c, 0);
            const auto slopes = Padded::load(slope + c, 0);
            const auto dz =
                dz_of<V, kSilu>(Values::load(dy + c, some), d, slopes, Padded::load(offset + c, 0));
            auto gradient = V::fma(d, Padded::load(twist + c, 0), Padded::load(level + c, 0));
            gradient = V::fma(dz, slopes, gradient);
            if (dsum != nullptr) gradient = gradient + Values::load(dsum + dense + c, some);
            Values::store(dx + c, some, gradient);
          });
    });
  }
  void start(int64_t, bool) const {}
  void second(int64_t, int64_t) const {}

 private:
  void prepare(int64_t n) {
    this->prepare_affine(n);
    this->prepared_ = n;
    const int64_t each = this->p_.shape.group_channels();
    for (int64_t c = 0; c < this->channels_; ++c) {
      const Gradient gradient(this->p_, n, c / each);
      this->row(3)[c] = gradient.level, this->row(4)[c] = gradient.twist;
    }
  }
};

// A unit is a channel of a sample, whose pixels follow one another.
template <class Type, bool kSilu>
class SumsDense {
  using Element = typename Type::Element;
  using V = PlaceLanes;

 public:
  explicit SumsDense(const GroupNormSiluBwdParams& p) : p_(p) {}

  void first(int64_t unit, int64_t chunk) const {
    const int64_t n = unit / p_.shape.channels, c = unit % p_.shape.channels;
    const int64_t pixels = p_.shape.pixels(), begin = chunk * p_.chunk;
    const Element* s = at<Element>(p_.s, unit * pixels + begin);
    const Element* dy = at<Element>(p_.dy, unit * pixels + begin);
    const ChannelAffine affine = affine_of(p_, n, c);
    const Places centre = V::splat(affine.centre), slope = V::splat(affine.slope);
    const Places offset = V::splat(affine.offset);
    Places of_dz = {}, of_dz_d = {}, of_d = {};
    const int64_t size = std::min(p_.chunk, pixels - begin);
    for_each_places(size, [&](auto block, int64_t i, int64_t rest) DDPM_FAST_INLINE {
      constexpr int kWhole = decltype(block)::value;
      Places d = load_places<Type, kWhole>(s + i, rest) - centre;
      if (kWhole == 0) d = only_before(rest, d);
      const Places dz = dz_of<V, kSilu>(load_places<Type, kWhole>(dy + i, rest), d, slope, offset);
      of_dz = of_dz + dz;
      of_dz_d = V::fma(dz, d, of_dz_d);
      of_d = of_d + d;
    });
    float* sums = p_.scratch + (n * p_.chunks + chunk) * 3 * p_.shape.channels + c;
    sums[0] = static_cast<float>(total(of_dz));
    sums[p_.shape.channels] = static_cast<float>(total(of_dz_d));
    sums[2 * p_.shape.channels] = static_cast<float>(total(of_d));
  }

  void start(int64_t unit, bool tells) const {
    const int64_t c = unit % p_.shape.channels;
    if (tells) add_up_chunks(p_, unit / p_.shape.channels, c, c + 1);
  }
  void second(int64_t, int64_t) const {}

 private:
  const GroupNormSiluBwdParams& p_;
};

template <class Type, bool kSilu>
class BwdDense {
  using Element = typename Type::Element;

 public:
  explicit BwdDense(const GroupNormSiluBwdParams& p) : p_(p) {}

  void first(int64_t unit, int64_t chunk) const {
    const int64_t n = unit / p_.shape.channels, c = unit % p_.shape.channels;
    const int64_t pixels = p_.shape.pixels(), begin = chunk * p_.chunk;
    const int64_t first = unit * pixels + begin;
    const Element *s = at<Element>(p_.s, first), *dy = at<Element>(p_.dy, first);
    const Element* dsum = p_.dsum != nullptr ? at<Element>(p_.dsum, first) : nullptr;
    Element* dx = static_cast<Element*>(p_.dx) + first;
    const ChannelAffine affine = affine_of(p_, n, c);
    const Gradient coefficients(p_, n, c / p_.shape.group_channels());
    const int64_t size = std::min(p_.chunk, pixels - begin);
    for_each_block<kPack>(size, [&](auto block, int64_t i, int64_t some) DDPM_FAST_INLINE {
      using Values = Block<Type, decltype(block)::value>;
      using V = PackLanes<Values::kVectors>;
      const auto d = Values::load(s + i, some) - V::splat(affine.centre);
      const auto slope = V::splat(affine.slope);
      const auto dz =
          dz_of<V, kSilu>(Values::load(dy + i, some), d, slope, V::splat(affine.offset));
      auto gradient = V::fma(d, V::splat(coefficients.twist), V::splat(coefficients.level));
      gradient = V::fma(dz, slope, gradient);
      if (dsum != nullptr) gradient = gradient + Values::load(dsum + i, some);
      Values::store(dx + i, some, gradient);
    });
  }
  void start(int64_t, bool) const {}
  void second(int64_t, int64_t) const {}

 private:
  const GroupNormSiluBwdParams& p_;
};

template <template <class, bool> class Last, template <class, bool> class Dense>
void run(const GroupNormSiluBwdParams& p, int threads) {
  with_type(p.dtype, [&](auto type) {
    using Type = decltype(type);
    const int64_t units = p.shape.samples * (p.shape.channels_last ? 1 : p.shape.channels);
    const int64_t elements = p.shape.samples * p.shape.channels * p.shape.pixels();
    const auto over = [&](const auto& make) {
      for_each_unit(units, p.chunks, elements, threads, make);
    };
    if (p.shape.channels_last) {
      p.silu ? over([&] { return Last<Type, true>(p); })
             : over([&] { return Last<Type, false>(p); });
    } else {
      p.silu ? over([&] { return Dense<Type, true>(p); })
             : over([&] { return Dense<Type, false>(p); });
    }
  });
}

}  // namespace

void group_norm_silu_sums(const GroupNormSiluBwdParams& p, int threads) {
  run<SumsChannelsLast, SumsDense>(p, threads);
}

void group_norm_silu_bwd(const GroupNormSiluBwdParams& p, int threads) {
  run<BwdChannelsLast, BwdDense>(p, threads);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
