// float32 <-> bfloat16 and binary16, rounded to nearest even, as 16-bit patterns.
#pragma once

#include "lanes.h"

namespace ddpm_fast {

// The order of DTYPES in ddpm_fast/backends.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// Bytes of an element.
DDPM_FAST_HD int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
}

template <class V>
DDPM_FAST_HD typename V::F float_from_bf16(typename V::U h) {
  return V::from_bits(h << 16);
}

template <class V>
DDPM_FAST_HD typename V::U bf16_from_float(typename V::F x) {
  using U = typename V::U;
  const U u = V::bits(x);
  const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const U quiet = (u >> 16) | 0x40u;
  return V::select(x != x, quiet, rounded);
}

DDPM_FAST_HD float float_from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  if ((h & 0x7C00u) == 0x7C00u) {  // infinity and NaN (made quiet)
    const uint32_t quiet = (h & 0x03FFu) != 0 ? 0x00400000u : 0u;
    return ScalarLanes::from_bits(sign | 0x7F800000u | magnitude | quiet);
  }
  // Moves the exponent's bias from 15 to 127, subnormals included, exactly.
  const float x = ScalarLanes::from_bits(magnitude) * 0x1p+112f;
  return ScalarLanes::from_bits(sign | ScalarLanes::bits(x));
}

DDPM_FAST_HD uint16_t half_from_float(float x) {
  const uint32_t u = ScalarLanes::bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x03FFu));
  }
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: the float addition rounds at the right bit
    const float aligned = ScalarLanes::from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (ScalarLanes::bits(aligned) - 0x3F000000u));
  }
  magnitude += 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

}  // namespace ddpm_fast
