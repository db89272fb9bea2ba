#include <vector>

#include "group_norm.h"
#include "kernels.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

// Sums over the places i % kPlaces of vectors, so that each instruction set adds in one order.
constexpr int kPlaces = 32;
constexpr int kRowVectors = kPlaces / kWidth;

// The mean of a chunk's elements of one group and their sum of squares about it, of the sums of
// d = u - guess and d^2.
struct ChunkMoments {
  float mean, squares;

  ChunkMoments(double guess, double of_d, double of_d2, double count)
      : mean(static_cast<float>(guess + of_d / count)),
        squares(static_cast<float>(of_d2 - of_d * of_d / count)) {}
};

// x and residual added into sum_out, `size` values that follow one another.
template <class Type>
void add_residual(const typename Type::Element* x, const typename Type::Element* residual,
                  typename Type::Element* sum, int64_t size) {
  for_each_block<kBlock>(size, [&](auto block, int64_t i, int64_t count) {
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
  for_each_block<kPack>(size, [&](auto block, int64_t i, int64_t count) {
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
  for_each_block<kPack>(size, [&](auto block, int64_t i, int64_t count) {
    using Values = Block<Type, decltype(block)::value>;
    using V = PackLanes<Values::kVectors>;
    auto z = V::fma(Values::load(s + i, count) - V::splat(c.centre), V::splat(c.slope),
                    V::splat(c.offset));
    if (kSilu) z = silu<V>(z);
    Values::store(y + i, count, z);
  });
}

// What both layouts know of a unit's statistics.
class Statistics {
 public:
  explicit Statistics(const GroupNormSiluParams& p) : p_(p) {}

  void put(int64_t n, int64_t group, int64_t chunk, const ChunkMoments& moments) const {
    float* at = place(n, group, chunk);
    at[0] = moments.mean;
    at[1] = moments.squares;
  }

  // Of the whole group, written down as well if `tells`: whose chunks have `chunk` times `each`
  // elements, the last the rest.
  void get(int64_t n, int64_t group, int64_t each, bool tells, float& mean, float& rstd) const {
    const int64_t elements = p_.shape.group_elements();
    Moments moments;
    for (int64_t k = 0; k < p_.chunks; ++k) {
      const float* at = place(n, group, k);
      const int64_t begin = k * p_.chunk * each;
      moments.add(static_cast<double>(std::min(p_.chunk * each, elements - begin)), at[0], at[1]);
    }
    mean = static_cast<float>(moments.mean);
    rstd = static_cast<float>(1.0 / __builtin_sqrt(moments.squares / elements + p_.eps));
    if (!tells || p_.mean == nullptr) return;
    p_.mean[n * p_.shape.groups + group] = mean;
    p_.rstd[n * p_.shape.groups + group] = rstd;
  }

 private:
  float* place(int64_t n, int64_t group, int64_t chunk) const {
    return p_.scratch + ((n * p_.shape.groups + group) * p_.chunks + chunk) * 2;
  }
  const GroupNormSiluParams& p_;
};

// A unit is a sample, a chunk some of its pixels. Sums are kept for each channel, so that vectors
// are whole whatever a group's channels are.
template <class Type, bool kSilu>
class ChannelsLast {
  using Element = typename Type::Element;

 public:
  explicit ChannelsLast(const GroupNormSiluParams& p)
      : p_(p),
        statistics_(p),
        padded_((p.shape.channels + kWidth - 1) / kWidth * kWidth),
        floats_(static_cast<size_t>(4 * padded_)),
        cols_(p.shape.cols) {
    const bool one_row = joined(p.shape, p.x_strides) && joined(p.shape, p.y_strides) &&
                         (p.residual == nullptr ||
                          (joined(p.shape, p.residual_strides) && joined(p.shape, p.sum_strides)));
    if (one_row) cols_ = p.shape.pixels();
    source_ = p.residual != nullptr ? p.sum_out : p.x;
    strides_ = p.residual != nullptr ? p.sum_strides : p.x_strides;
  }

  void first(int64_t n, int64_t chunk) {
    const Pixels pixels = pixels_of(chunk);
    if (p_.residual != nullptr) add(n, pixels);
    const GroupNormShape& shape = p_.shape;
    const int64_t each = shape.group_channels();
    const double count = static_cast<double>((pixels.end - pixels.begin) * each);
    float *sums = floats_.data(), *squares = sums + padded_, *centre = squares + padded_;
    add_up(n, pixels, sums);
    for (int64_t g = 0, c = 0; g < shape.groups; ++g) {
      const int64_t end = c + each;
      double total = 0, of_emb = 0;
      for (int64_t i = c; i < end; ++i) total += sums[i], of_emb += p_.affine.emb_at(n, i);
      const float guess = static_cast<float>(total / count + of_emb / each);
      for (; c < end; ++c) centre[c] = guess - p_.affine.emb_at(n, c);
    }
    add_up_squares(n, pixels, centre, sums, squares);
    for (int64_t g = 0, c = 0; g < shape.groups; ++g) {
      const double guess = static_cast<double>(centre[c]) + p_.affine.emb_at(n, c);
      double of_d = 0, of_d2 = 0;
      for (const int64_t end = c + each; c < end; ++c) of_d += sums[c], of_d2 += squares[c];
      statistics_.put(n, g, chunk, {guess, of_d, of_d2, count});
    }
  }

  void start(int64_t n, bool tells) {
    const GroupNormShape& shape = p_.shape;
    const int64_t each = shape.group_channels();
    float *centre = floats_.data(), *slope = centre + padded_, *offset = slope + padded_;
    for (int64_t g = 0, c = 0; g < shape.groups; ++g) {
      float mean, rstd;
      statistics_.get(n, g, each, tells, mean, rstd);
      for (const int64_t end = c + each; c < end; ++c) {
        const ChannelAffine affine = p_.affine.at(n, c, mean, rstd);
        centre[c] = affine.centre, slope[c] = affine.slope, offset[c] = affine.offset;
      }
    }
  }

  void second(int64_t n, int64_t chunk) {
    const float *centre = floats_.data(), *slope = centre + padded_, *offset = slope + padded_;
    const Element* s = at<Element>(source_, n * strides_.sample);
    Element* y = static_cast<Element*>(p_.y) + n * p_.y_strides.sample;
    pixels_of(chunk).for_each_row([&](int64_t row, int64_t column, int64_t count) {
      const Element* from = row_of(s, strides_, row, column);
      Element* to = row_of(y, p_.y_strides, row, column);
      for (int64_t i = 0; i < count; ++i) {
        normalise<Type, kSilu>(from, to, p_.shape.channels, centre, slope, offset);
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

  void add(int64_t n, const Pixels& pixels) const {
    const Element* x = at<Element>(p_.x, n * p_.x_strides.sample);
    const Element* residual = at<Element>(p_.residual, n * p_.residual_strides.sample);
    Element* sum = static_cast<Element*>(p_.sum_out) + n * p_.sum_strides.sample;
    pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) {
      for (int64_t i = column; i < column + count; ++i) {
        add_residual<Type>(row_of(x, p_.x_strides, row, i),
                           row_of(residual, p_.residual_strides, row, i),
                           row_of(sum, p_.sum_strides, row, i), p_.shape.channels);
      }
    });
  }

  // sums[c] = sum of s over the pixels.
  void add_up(int64_t n, const Pixels& pixels, float* sums) const {
    const Element* s = at<Element>(source_, n * strides_.sample);
    for_each_block<kBlock>(p_.shape.channels, [&](auto block, int64_t c, int64_t some) {
      using Values = Block<Type, decltype(block)::value>;
      typename Values::Values sum = {};
      pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) {
        const Element* from = row_of(s, strides_, row, column) + c;
        for (int64_t i = 0; i < count; ++i, from += strides_.pixel) {
          sum = sum + Values::load(from, some);
        }
      });
      Block<Float32, Values::kVectors>::store(sums + c, 0, sum);
    });
  }

  // sums[c] = sum of s - centre, squares[c] = sum of (s - centre)^2.
  void add_up_squares(int64_t n, const Pixels& pixels, const float* centre, float* sums,
                      float* squares) const {
    const Element* s = at<Element>(source_, n * strides_.sample);
    for_each_block<kBlock>(p_.shape.channels, [&](auto block, int64_t c, int64_t some) {
      using Values = Block<Type, decltype(block)::value>;
      using Whole = Block<Float32, Values::kVectors>;
      using V = PackLanes<Values::kVectors>;
      typename Values::Values sum = {}, square = {};
      const auto middle = Whole::load(centre + c, 0);
      pixels.for_each_row([&](int64_t row, int64_t column, int64_t count) {
        const Element* from = row_of(s, strides_, row, column) + c;
        for (int64_t i = 0; i < count; ++i, from += strides_.pixel) {
          const auto d = Values::load(from, some) - middle;
          sum = sum + d;
          square = V::fma(d, d, square);
        }
      });
      Whole::store(sums + c, 0, sum);
      Whole::store(squares + c, 0, square);
    });
  }

  const GroupNormSiluParams& p_;
  Statistics statistics_;
  int64_t padded_;
  std::vector<float> floats_;
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
      : p_(p), statistics_(p), size_(p.shape.group_elements()), pixels_(p.shape.pixels()) {
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
    Row sum = {};
    double of_emb = 0;
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) {
      of_emb += static_cast<double>(p_.affine.emb_at(n, c)) * some;
      for_each_places(some, [&](auto block, int64_t j, int64_t rest) {
        sum = sum + load_places<decltype(block)::value>(s + i + j, rest);
      });
    });
    const float guess = static_cast<float>((total(sum) + of_emb) / count);
    Row of_d = {}, of_d2 = {};
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) {
      const auto centre = V::splat(guess - p_.affine.emb_at(n, c));
      for_each_places(some, [&](auto block, int64_t j, int64_t rest) {
        Row d = load_places<decltype(block)::value>(s + i + j, rest) - centre;
        if (decltype(block)::value == 0) d = only_before(rest, d);
        of_d = of_d + d;
        of_d2 = V::fma(d, d, of_d2);
      });
    });
    statistics_.put(n, unit % p_.shape.groups, chunk, {guess, total(of_d), total(of_d2), count});
  }

  void start(int64_t unit, bool tells) {
    statistics_.get(unit / p_.shape.groups, unit % p_.shape.groups, 1, tells, mean_, rstd_);
  }

  void second(int64_t unit, int64_t chunk) {
    const int64_t base = unit * size_, n = unit / p_.shape.groups;
    const int64_t begin = chunk * p_.chunk, end = std::min(begin + p_.chunk, size_);
    const Element* s = at<Element>(source_, base);
    Element* y = static_cast<Element*>(p_.y) + base;
    for_each_channel(unit, begin, end, [&](int64_t c, int64_t i, int64_t some) {
      normalise<Type, kSilu>(s + i, y + i, some, p_.affine.at(n, c, mean_, rstd_));
    });
  }

 private:
  using V = PackLanes<kRowVectors>;
  using Row = typename V::F;

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

  template <class F>
  static DDPM_FAST_HD void for_each_places(int64_t size, const F& f) {
    int64_t i = 0;
    for (; i + kPlaces <= size; i += kPlaces) f(BlockOf<1>{}, i, kPlaces);
    if (i < size) f(BlockOf<0>{}, i, size - i);
  }

  template <int kWhole>
  static DDPM_FAST_HD Row load_places(const Element* p, int64_t count) {
    Element padded[kPlaces] = {};
    if (kWhole == 0) {
      __builtin_memcpy(padded, p, count * sizeof *p);
      p = padded;
    }
    return Block<Type, kRowVectors>::load(p, 0);
  }

  static DDPM_FAST_HD Row only_before(int64_t count, const Row& row) {
    float values[kPlaces] = {};
    for (int r = 0; r < kRowVectors; ++r) store_unaligned(values + r * kWidth, row.v[r]);
    for (int64_t i = count; i < kPlaces; ++i) values[i] = 0.0f;
    return Block<Float32, kRowVectors>::load(values, 0);
  }

  static double total(const Row& row) {
    float values[kPlaces];
    for (int r = 0; r < kRowVectors; ++r) store_unaligned(values + r * kWidth, row.v[r]);
    double sum = 0;
    for (const float value : values) sum += value;
    return sum;
  }

  const GroupNormSiluParams& p_;
  Statistics statistics_;
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
