// The work in pieces of kGranule elements, float32 in and out whatever the tensors hold. A whole
// granule of float32 is read and written in place; other types, and the last few elements of a
// sample, pass through a buffer in the first-level cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../core/noise.h"
#include "../core/normal.h"
#include "pack.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

constexpr int kGranule = 256;
constexpr int kTile = 4096;  // elements a thread takes at a time; a multiple of kGranule

template <class T>
inline const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

template <class T>
inline T* element(T* base, DType dtype, int64_t offset) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + offset * size_of(dtype);
}

// A type in memory, kWidth values at a time, or two times kWidth.
template <class Type>
struct Pairs {
  template <class Element>
  static DDPM_FAST_HD void load_pair(const Element* p, VecF& a, VecF& b) {
    a = Type::load(p);
    b = Type::load(p + kWidth);
  }
  template <class Element>
  static DDPM_FAST_HD void store_pair(Element* p, VecF a, VecF b) {
    Type::store(p, a);
    Type::store(p + kWidth, b);
  }
};
struct Float32 : Pairs<Float32> {
  using Element = float;
  static DDPM_FAST_HD VecF load(const Element* p) { return load_unaligned<VecF>(p); }
  static DDPM_FAST_HD void store(Element* p, VecF v) { store_unaligned(p, v); }
};
struct BFloat16 {
  using Element = uint16_t;
  static DDPM_FAST_HD VecF load(const Element* p) { return Lanes::load_bf16(p); }
  static DDPM_FAST_HD void store(Element* p, VecF v) { Lanes::store_bf16(p, v); }
  static DDPM_FAST_HD void load_pair(const Element* p, VecF& a, VecF& b) {
    Lanes::load_bf16_pair(p, a, b);
  }
  static DDPM_FAST_HD void store_pair(Element* p, VecF a, VecF b) {
    Lanes::store_bf16_pair(p, a, b);
  }
};
struct Float16 : Pairs<Float16> {
  using Element = uint16_t;
  static DDPM_FAST_HD VecF load(const Element* p) { return Lanes::load_half(p); }
  static DDPM_FAST_HD void store(Element* p, VecF v) { Lanes::store_half(p, v); }
};
struct Pixel {
  using Element = uint8_t;
  static DDPM_FAST_HD VecF load(const Element* p) { return Lanes::load_u8(p); }
};

template <class From, class To>
inline void convert_granule(const void* source, void* target) {
  const auto* in = static_cast<const typename From::Element*>(source);
  auto* out = static_cast<typename To::Element*>(target);
  for (int i = 0; i < kGranule; i += kWidth) To::store(out + i, From::load(in + i));
}

// kGranule values of any type as float32, and back as bfloat16 or float16.
inline void widen(const void* source, DType dtype, float* out) {
  switch (dtype) {
    case DType::kFloat32: return convert_granule<Float32, Float32>(source, out);
    case DType::kBFloat16: return convert_granule<BFloat16, Float32>(source, out);
    case DType::kFloat16: return convert_granule<Float16, Float32>(source, out);
    case DType::kUInt8: return convert_granule<Pixel, Float32>(source, out);
  }
}
inline void narrow(const float* values, DType dtype, void* out) {
  if (dtype == DType::kBFloat16) return convert_granule<Float32, BFloat16>(values, out);
  convert_granule<Float32, Float16>(values, out);
}

// Elements [offset, offset + n) as float32, n <= kGranule: a pointer into memory where that is
// possible, else into `buffer` (kGranule floats), padded with zeros.
inline const float* load(const void* base, DType dtype, int64_t offset, int n, float* buffer) {
  const char* source = static_cast<const char*>(base) + offset * size_of(dtype);
  if (n == kGranule) {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(source);
    widen(source, dtype, buffer);
    return buffer;
  }
  alignas(64) char padded[kGranule * sizeof(float)] = {};
  __builtin_memcpy(padded, source, n * size_of(dtype));
  widen(padded, dtype, buffer);
  return buffer;
}

// Where a granule of results goes first: memory itself where it holds float32, else `buffer`.
inline float* target(void* base, DType dtype, int64_t offset, int n, float* buffer) {
  const bool direct = n == kGranule && dtype == DType::kFloat32;
  return direct ? static_cast<float*>(base) + offset : buffer;
}

// Brings what was written to target()'s answer into memory, if it is not there already.
inline void commit(void* base, DType dtype, int64_t offset, int n, const float* values) {
  char* destination = static_cast<char*>(base) + offset * size_of(dtype);
  if (dtype == DType::kFloat32) {
    if (n < kGranule) __builtin_memcpy(destination, values, n * sizeof(float));
  } else if (n == kGranule) {
    narrow(values, dtype, destination);
  } else {
    alignas(64) uint16_t padded[kGranule];
    narrow(values, dtype, padded);
    __builtin_memcpy(destination, padded, n * sizeof(uint16_t));
  }
}

// How many groups of 4 * kWidth elements are drawn in step, as measured: one, two and four of them
// give 2.0, 2.5 and 2.8 G normals a second on a Zen 5 core with AVX-512.
#if defined(__AVX512F__)
constexpr int kGroups = 4;
#elif defined(__AVX2__)
constexpr int kGroups = 2;
#else
constexpr int kGroups = 1;
#endif

static_assert(kGranule % (4 * kWidth * kGroups) == 0, "a granule is whole groups");

// out[i] = z of element 4 * first_block + i, i < 4 * kWidth * kCount.
template <int kCount>
inline __attribute__((always_inline)) void draw_groups(const NoiseKey& key, uint32_t first_block,
                                                       float* out) {
  using Words = PackLanes<kCount>;
  typename Words::Word c[4];
  for (int g = 0; g < kCount; ++g) {
    c[0].v[g] = Lanes::block_counters(first_block + g * kWidth);
    c[1].v[g] = Lanes::splat_word(key.draw);
    c[2].v[g] = Lanes::splat_word(static_cast<uint32_t>(key.sample));
    c[3].v[g] = Lanes::splat_word(static_cast<uint32_t>(key.sample >> 32));
  }
  philox4x32_10<Words>(c, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));

  using Pairs = PackLanes<2 * kCount>;  // (w0, w1) of each group, then (w2, w3)
  typename Pairs::U w_even, w_odd;
  for (int g = 0; g < kCount; ++g) {
    w_even.v[g] = Lanes::pack(c[0].v[g]);
    w_odd.v[g] = Lanes::pack(c[1].v[g]);
    w_even.v[kCount + g] = Lanes::pack(c[2].v[g]);
    w_odd.v[kCount + g] = Lanes::pack(c[3].v[g]);
  }
  typename Pairs::F z_even, z_odd;
  box_muller<Pairs>(w_even, w_odd, z_even, z_odd);
  for (int g = 0; g < kCount; ++g) {
    Lanes::store_interleaved(out + g * 4 * kWidth, z_even.v[g], z_odd.v[g], z_even.v[kCount + g],
                             z_odd.v[kCount + g]);
  }
}

// The noise of elements [first, first + count), first a multiple of 4, count at most kGranule;
// `out` has room for kGranule values, and those past `count` are of no meaning.
inline void draw_granule(const NoiseKey& key, int64_t first, int64_t count, float* out) {
  constexpr int kGroup = 4 * kWidth, kStep = kGroup * kGroups;
  const uint32_t block = static_cast<uint32_t>(first >> 2);
  int i = 0;
  for (; i + kStep - kGroup < count; i += kStep) draw_groups<kGroups>(key, block + i / 4, out + i);
  for (; i < count; i += kGroup) draw_groups<1>(key, block + i / 4, out + i);
}

// Pixels a tile of a channels_last tensor holds: about kTile elements, whole granules a channel.
inline int64_t tile_pixels(const Shape& shape) {
  return std::max<int64_t>(kGranule, kTile / shape.channels / kGranule * kGranule);
}

// Channels whose noise is brought into memory order together.
constexpr int kRows = 4;

// A channel's row of noise starts anywhere in its first block and ends anywhere in its last
// granule.
inline int64_t row_floats(int64_t pixels) { return pixels + 2 * kGranule; }

// Room that draw_channels_last needs: for the noise in memory order, then for kRows rows of it.
inline int64_t channels_last_floats(const Shape& shape) {
  const int64_t pixels = std::min(shape.pixels, tile_pixels(shape));
  return pixels * shape.channels + kGranule + kRows * row_floats(pixels);
}

// out[p * stride + r] = row r's p-th value, r < kCount. Where stride is kCount, as for images, the
// compiler makes shuffles of it.
template <int kCount>
inline void interleave(const float* const (&rows)[kRows], int64_t count, int64_t stride,
                       float* out) {
  const float* row[kCount];
  for (int r = 0; r < kCount; ++r) row[r] = rows[r];
  if (stride == kCount) {
    for (int64_t p = 0; p < count; ++p) {
      for (int r = 0; r < kCount; ++r) out[p * kCount + r] = row[r][p];
    }
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int r = 0; r < kCount; ++r) out[p * stride + r] = row[r][p];
  }
}

// The noise of pixels [begin, end) of a channels_last sample, in memory order, at `out`.
inline void draw_channels_last(const NoiseKey& key, const Shape& shape, int64_t begin, int64_t end,
                               float* out) {
  const int64_t channels = shape.channels, count = end - begin;
  float* const buffer = out + count * channels + kGranule;
  for (int64_t c = 0; c < channels; c += kRows) {
    const int held = static_cast<int>(std::min<int64_t>(kRows, channels - c));
    const float* rows[kRows];
    for (int r = 0; r < held; ++r) {
      const int64_t first = (c + r) * shape.pixels + begin, skipped = first & 3;
      float* row = buffer + r * row_floats(count);
      for (int64_t i = 0; i < skipped + count; i += kGranule) {
        draw_granule(key, first - skipped + i, std::min<int64_t>(skipped + count - i, kGranule),
                     row + i);
      }
      rows[r] = row + skipped;
    }
    switch (held) {
      case 1: interleave<1>(rows, count, channels, out + c); break;
      case 2: interleave<2>(rows, count, channels, out + c); break;
      case 3: interleave<3>(rows, count, channels, out + c); break;
      default: interleave<4>(rows, count, channels, out + c); break;
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
