// The vocabulary in which core/ is written: a Lanes type names how many values one call works on
// (one here and on a GPU, 4 to 16 in cpu/simd.h) and supplies the few operations whose rounding the
// noise contract fixes. Everything else is the language's own + - * & | ^ << >> < ?:.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FAST_HD __host__ __device__ __forceinline__
#else
#include <cmath>
#define DDPM_FAST_HD inline __attribute__((always_inline))
#endif

namespace ddpm_fast {

struct ScalarLanes {
  using F = float;
  using U = uint32_t;
  using I = int32_t;
  using Word = uint32_t;  // a Philox word; SIMD lanes keep it in 64-bit halves

  static DDPM_FAST_HD F splat(float x) { return x; }
  static DDPM_FAST_HD U bits(F x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    U u;
    std::memcpy(&u, &x, sizeof u);
    return u;
#endif
  }
  static DDPM_FAST_HD F from_bits(U u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    F x;
    std::memcpy(&x, &u, sizeof x);
    return x;
#endif
  }
  static DDPM_FAST_HD I to_signed(U u) { return static_cast<I>(u); }  // the same bits
  static DDPM_FAST_HD U to_unsigned(I i) { return static_cast<U>(i); }
  template <class T>
  static DDPM_FAST_HD T select(bool condition, T yes, T no) {
    return condition ? yes : no;
  }
  // Round to nearest even, as every conversion here.
  static DDPM_FAST_HD F from_int(I i) {
#if defined(__CUDA_ARCH__)
    return __int2float_rn(i);
#else
    return static_cast<F>(i);
#endif
  }
  static DDPM_FAST_HD F fma(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  static DDPM_FAST_HD F sqrt(F x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
  static DDPM_FAST_HD void mul_hi_lo(uint32_t m, Word w, Word& hi, Word& lo) {
    const uint64_t product = static_cast<uint64_t>(m) * w;
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
  static DDPM_FAST_HD Word xor3(Word a, Word b, uint32_t key) { return a ^ b ^ key; }
};

}  // namespace ddpm_fast
