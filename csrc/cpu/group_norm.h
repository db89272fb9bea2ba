// What the kernels of group_norm_silu share on the CPU: values of any type as vectors, pixels of a
// chunk row by row, channels in blocks of vectors, and work that is shared out without a change of
// bits.
#pragma once

#include <algorithm>

#include "../core/group_norm_silu.h"
#include "granule.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// Vectors that are worked on together: as many as accumulators and coefficients find registers.
#if defined(__AVX512F__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
#define DDPM_FAST_INLINE __attribute__((always_inline))  // of a lambda
constexpr int kPack = 4;                                 // of the SiLU, whose chains are long

// f(Float32{}) or that of the type at hand.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    default: return f(Float32{});
  }
}

// The first `count` < kWidth values, then zeros.
template <class Type>
DDPM_FAST_HD VecF load_some(const typename Type::Element* p, int64_t count) {
  typename Type::Element padded[kWidth] = {};
  __builtin_memcpy(padded, p, count * sizeof *p);
  return Type::load(padded);
}
template <class Type>
DDPM_FAST_HD void store_some(typename Type::Element* p, int64_t count, VecF v) {
  typename Type::Element padded[kWidth];
  Type::store(padded, v);
  __builtin_memcpy(p, padded, count * sizeof *p);
}

// kCount whole vectors, or, of kCount = 0, one of fewer values.
template <class Type, int kCount>
struct Block {
  static constexpr int kVectors = kCount > 0 ? kCount : 1;
  using Element = typename Type::Element;
  using Values = Pack<VecF, kVectors>;

  static DDPM_FAST_HD Values load(const Element* p, int64_t count) {
    Values values;
    for (int b = 0; b < kVectors; ++b) {
      values.v[b] = kCount > 0 ? Type::load(p + b * kWidth) : load_some<Type>(p, count);
    }
    return values;
  }
  static DDPM_FAST_HD void store(Element* p, int64_t count, const Values& values) {
    for (int b = 0; b < kVectors; ++b) {
      if (kCount > 0) Type::store(p + b * kWidth, values.v[b]);
      if (kCount == 0) store_some<Type>(p, count, values.v[b]);
    }
  }
};

template <int kCount>
struct BlockOf {
  static constexpr int value = kCount;
};

// f(BlockOf<vectors>, first, count) for `size` values in blocks of kMost vectors, then of fewer.
template <int kMost, class F>
DDPM_FAST_HD void for_each_block(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kMost * kWidth <= size; i += kMost * kWidth) f(BlockOf<kMost>{}, i, kMost * kWidth);
  if constexpr (kMost > 4) {
    if (i + 4 * kWidth <= size) f(BlockOf<4>{}, i, 4 * kWidth), i += 4 * kWidth;
  }
  if constexpr (kMost > 2) {
    if (i + 2 * kWidth <= size) f(BlockOf<2>{}, i, 2 * kWidth), i += 2 * kWidth;
  }
  for (; i + kWidth <= size; i += kWidth) f(BlockOf<1>{}, i, kWidth);
  if (i < size) f(BlockOf<0>{}, i, size - i);
}

// Sums over values that follow one another, in the places i % kPlaces, so that each instruction set
// adds in one order.
constexpr int kPlaces = 32;
using PlaceLanes = PackLanes<kPlaces / kWidth>;
using Places = PlaceLanes::F;

// f(BlockOf<1>, first, kPlaces) for whole rows of places, then f(BlockOf<0>, first, the rest).
template <class F>
DDPM_FAST_HD void for_each_places(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kPlaces <= size; i += kPlaces) f(BlockOf<1>{}, i, kPlaces);
  if (i < size) f(BlockOf<0>{}, i, size - i);
}
template <class Type, int kWhole>
DDPM_FAST_HD Places load_places(const typename Type::Element* p, int64_t count) {
  typename Type::Element padded[kPlaces] = {};
  if (kWhole == 0) {
    __builtin_memcpy(padded, p, count * sizeof *p);
    p = padded;
  }
  return Block<Type, kPlaces / kWidth>::load(p, 0);
}
// Zeros from `count` on.
inline Places only_before(int64_t count, const Places& row) {
  float values[kPlaces] = {};
  Block<Float32, kPlaces / kWidth>::store(values, 0, row);
  for (int64_t i = count; i < kPlaces; ++i) values[i] = 0.0f;
  return Block<Float32, kPlaces / kWidth>::load(values, 0);
}
inline double total(const Places& row) {
  float values[kPlaces];
  Block<Float32, kPlaces / kWidth>::store(values, 0, row);
  double sums[kPlaces];
  for (int i = 0; i < kPlaces; ++i) sums[i] = values[i];
  for (int n = kPlaces / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  return sums[0];
}

// Rows that follow one another without a gap are one.
inline bool joined(const GroupNormShape& shape, const PixelStrides& strides) {
  return shape.rows == 1 || strides.row == shape.cols * strides.pixel;
}

// Pixels [begin, end) of a sample in channels_last.
struct Pixels {
  int64_t begin, end, cols;

  // f(row, column, count) for each row that they have a part of.
  template <class F>
  DDPM_FAST_HD void for_each_row(const F& f) const {
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / cols, column = i - row * cols;
      const int64_t count = std::min(end - i, cols - column);
      f(row, column, count);
      i += count;
    }
  }
};

// One tensor's first element of a row of pixels.
template <class Element>
DDPM_FAST_HD Element* row_of(Element* sample, const PixelStrides& strides, int64_t row,
                             int64_t column) {
  return sample + row * strides.row + column * strides.pixel;
}

// Independent units of `chunks` chunks each: first(unit, chunk) for all of its chunks, then
// start(unit, whether it is the one that tells), then second(unit, chunk). Of as many units as
// every thread can have the same number of, one thread does all, so that it finds a unit in its
// cache again; the chunks of the others are shared out. `make` gives each thread its worker.
template <class Make>
void for_each_unit(int64_t units, int64_t chunks, int64_t elements, int threads, const Make& make) {
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + elements / kPerThread));
  const auto alone = [&](auto& worker, int64_t unit) {
    for (int64_t k = 0; k < chunks; ++k) worker.first(unit, k);
    worker.start(unit, true);
    for (int64_t k = 0; k < chunks; ++k) worker.second(unit, k);
  };
  if (threads == 1) {
    auto worker = make();
    for (int64_t u = 0; u < units; ++u) alone(worker, u);
    return;
  }
  const int64_t whole = chunks == 1 ? units : units / threads * threads;
  const int64_t shared = (units - whole) * chunks;
#pragma omp parallel num_threads(threads)
  {
    auto worker = make();
#pragma omp for schedule(static) nowait
    for (int64_t u = 0; u < whole; ++u) alone(worker, u);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shared; ++i) worker.first(whole + i / chunks, i % chunks);
    int64_t started = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shared; ++i) {
      const int64_t u = whole + i / chunks;
      if (u != started) worker.start(u, i % chunks == 0);
      started = u;
      worker.second(u, i % chunks);
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
