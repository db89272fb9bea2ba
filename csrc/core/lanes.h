// The vocabulary in which core/ is written: a Lanes type names how many values one call works on
// (one here and on a GPU, 4 to 16 in cpu/simd.h) and supplies the few operations whose rounding the
// noise contract fixes. Everything else is the language's own + - * & | ^ << >> < ?:.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FAST_HD __host__ __device__ __forceinline__
#define DDPM_FAST_UNROLL _Pragma("unroll")
#else
#include <cmath>
#define DDPM_FAST_HD inline __attribute__((always_inline))
#define DDPM_FAST_UNROLL
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
  static DDPM_FAST_HD bool has_bit(U u, uint32_t bit) {
#if defined(__CUDA_ARCH__)
    asm("and.b32 %0, %0, %1;" : "+r"(u) : "r"(bit));
    return u != 0;
#else
    return (u & bit) != 0;
#endif
  }
  static DDPM_FAST_HD U fold(U w) {
#if defined(__CUDA_ARCH__)
    asm("{\n"
        ".reg .pred high;\n"
        "setp.lt.s32 high, %0, 0;\n"
        "@high not.b32 %0, %0;\n"
        "}"
        : "+r"(w));
    return w;
#else
    return w < ~w ? w : ~w;
#endif
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
    // What __fsqrt_rn does for x in [2^-101, 2^126], without its branch to what it does elsewhere;
    // normals take the root of numbers in [2^-32, 46).
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float root = x * y;
    return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root);
#else
    return std::sqrt(x);
#endif
  }
  // max(x, lo) and min(x, hi), but NaN where x is NaN; of two zeros, the bound is the result or the
  // same as it, as long as no bound is -0.
  static DDPM_FAST_HD F at_least(F x, F lo) {
#if defined(__CUDA_ARCH__)
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(lo));
    return x;
#else
    return x <= lo ? lo : x;
#endif
  }
  static DDPM_FAST_HD F at_most(F x, F hi) {
#if defined(__CUDA_ARCH__)
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(hi));
    return x;
#else
    return x > hi ? hi : x;
#endif
  }
  // The same for bounds other than 0, an instruction less with vectors.
  static DDPM_FAST_HD F above(F x, F lo) { return at_least(x, lo); }
  static DDPM_FAST_HD F below(F x, F hi) { return at_most(x, hi); }
  static DDPM_FAST_HD void mul_hi_lo(uint32_t m, Word w, Word& hi, Word& lo) {
#if defined(__CUDA_ARCH__)
    uint64_t product;  // in C++ each high half would take an addition more
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(w), "r"(m));
#else
    const uint64_t product = static_cast<uint64_t>(m) * w;
#endif
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
  static DDPM_FAST_HD Word xor3(Word a, Word b, uint32_t key) { return a ^ b ^ key; }
};

}  // namespace ddpm_fast
