// How a lane reads and writes: whole vectors of 4, 8 or 16 bytes for the kernels of regular shapes,
// single elements for the rest; float32 in registers whatever the tensors hold.
#pragma once

#include "../core/convert.h"

namespace ddpm_fast {
namespace cuda {

template <int kBytes>
struct alignas(kBytes) Vector {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what one instruction can move");
  uint32_t words[kBytes / 4];
};

template <int kBytes>
DDPM_FAST_HD Vector<kBytes> load_vector(const void* p) {
  Vector<kBytes> v;
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    const uint4 found = *static_cast<const uint4*>(p);
    v.words[0] = found.x, v.words[1] = found.y, v.words[2] = found.z, v.words[3] = found.w;
  } else if constexpr (kBytes == 8) {
    const uint2 found = *static_cast<const uint2*>(p);
    v.words[0] = found.x, v.words[1] = found.y;
  } else {
    v.words[0] = *static_cast<const uint32_t*>(p);
  }
#else
  std::memcpy(&v, p, kBytes);
#endif
  return v;
}

template <int kBytes>
DDPM_FAST_HD void store_vector(void* p, const Vector<kBytes>& v) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(p) = uint4{v.words[0], v.words[1], v.words[2], v.words[3]};
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(p) = uint2{v.words[0], v.words[1]};
  } else {
    *static_cast<uint32_t*>(p) = v.words[0];
  }
#else
  std::memcpy(p, &v, kBytes);
#endif
}

// The processor's own conversions of two values at a time. They round as core/convert.h does and
// differ from it in the bits of a NaN only.
DDPM_FAST_HD uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bf16_from_float<ScalarLanes>(low) | bf16_from_float<ScalarLanes>(high) << 16;
#endif
}

DDPM_FAST_HD uint32_t half_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return half_from_float(low) | static_cast<uint32_t>(half_from_float(high)) << 16;
#endif
}

DDPM_FAST_HD void floats_from_half_pair(uint32_t pair, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  asm("{\n"
      ".reg .f16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n"
      "}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
#else
  low = float_from_half(static_cast<uint16_t>(pair));
  high = float_from_half(static_cast<uint16_t>(pair >> 16));
#endif
}

// A type in memory: kSize bytes an element, kCount elements to and from a vector's words.
struct Float32 {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kSize = 4;
  template <int kCount>
  static DDPM_FAST_HD void unpack(const uint32_t (&words)[kCount], float* out) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = ScalarLanes::from_bits(words[i]);
  }
  template <int kCount>
  static DDPM_FAST_HD void pack(const float* values, uint32_t (&words)[kCount]) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kCount; ++i) words[i] = ScalarLanes::bits(values[i]);
  }
};
struct BFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kSize = 2;
  template <int kWords>
  static DDPM_FAST_HD void unpack(const uint32_t (&words)[kWords], float* out) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) {
      out[2 * i] = ScalarLanes::from_bits(words[i] << 16);
      out[2 * i + 1] = ScalarLanes::from_bits(words[i] & 0xFFFF0000u);
    }
  }
  template <int kWords>
  static DDPM_FAST_HD void pack(const float* values, uint32_t (&words)[kWords]) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = bf16_pair(values[2 * i], values[2 * i + 1]);
  }
};
struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr int kSize = 2;
  template <int kWords>
  static DDPM_FAST_HD void unpack(const uint32_t (&words)[kWords], float* out) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) floats_from_half_pair(words[i], out[2 * i], out[2 * i + 1]);
  }
  template <int kWords>
  static DDPM_FAST_HD void pack(const float* values, uint32_t (&words)[kWords]) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = half_pair(values[2 * i], values[2 * i + 1]);
  }
};
// A byte p comes as p - 127.5: between 2^15 and 2^16 it is the second byte of a float.
struct Pixel {
  static constexpr DType kDType = DType::kUInt8;
  static constexpr int kSize = 1;
  template <int kWords>
  static DDPM_FAST_HD void unpack(const uint32_t (&words)[kWords], float* out) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) {
      DDPM_FAST_UNROLL
      for (int j = 0; j < 4; ++j) {
#if defined(__CUDA_ARCH__)
        const uint32_t bits = __byte_perm(words[i], 0x47000000u, 0x7604u | j << 4);
#else
        const uint32_t bits = 0x47000000u | (words[i] >> 8 * j & 0xFFu) << 8;
#endif
        out[4 * i + j] = ScalarLanes::from_bits(bits) - 32895.5f;
      }
    }
  }
};

DDPM_FAST_HD const void* element(const void* base, int64_t i, int size) {
  return static_cast<const char*>(base) + i * size;
}
DDPM_FAST_HD void* element(void* base, int64_t i, int size) {
  return static_cast<char*>(base) + i * size;
}

// kCount neighbouring elements, aligned to as many bytes as they take or to 16.
template <class Type, int kCount>
DDPM_FAST_HD void load(const void* p, float* out) {
  constexpr int kBytes = kCount * Type::kSize < 16 ? kCount * Type::kSize : 16;
  constexpr int kEach = kBytes / Type::kSize;
  DDPM_FAST_UNROLL
  for (int i = 0; i < kCount; i += kEach) {
    Type::unpack(load_vector<kBytes>(element(p, i, Type::kSize)).words, out + i);
  }
}
template <class Type, int kCount>
DDPM_FAST_HD void store(void* p, const float* values) {
  constexpr int kBytes = kCount * Type::kSize < 16 ? kCount * Type::kSize : 16;
  constexpr int kEach = kBytes / Type::kSize;
  DDPM_FAST_UNROLL
  for (int i = 0; i < kCount; i += kEach) {
    Vector<kBytes> v;
    Type::pack(values + i, v.words);
    store_vector(element(p, i, Type::kSize), v);
  }
}

// Single elements.
DDPM_FAST_HD float value_at(const void* base, DType dtype, int64_t i) {
  float value, unused;
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(base)[i];
    case DType::kBFloat16:
      return float_from_bf16<ScalarLanes>(static_cast<const uint16_t*>(base)[i]);
    case DType::kFloat16:
      floats_from_half_pair(static_cast<const uint16_t*>(base)[i], value, unused);
      return value;
    default: return ScalarLanes::from_int(static_cast<const uint8_t*>(base)[i]) - 127.5f;
  }
}
DDPM_FAST_HD void put(void* base, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(base)[i] = value; break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(bf16_pair(value, 0.0f));
      break;
    default: static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(half_pair(value, 0.0f));
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
