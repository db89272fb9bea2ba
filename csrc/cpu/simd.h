// Lanes for one instruction set. The files of this folder that include it are compiled once for
// each (CMakeLists.txt), with DDPM_FAST_ISA as the namespace of everything in them, so that no code
// built for AVX-512 is ever merged with another copy of the same function.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../core/convert.h"
#include "../core/lanes.h"

#if !defined(DDPM_FAST_ISA)
#error "DDPM_FAST_ISA names the instruction set: avx512, avx2 or portable"
#endif

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float VecF __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint64_t VecU64 __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kWidth * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kWidth)));

// A Philox word for kWidth blocks, each in the low half of a 64-bit lane (the high halves hold
// whatever multiplication left there): the even blocks in `even`, the odd ones in `odd`.
struct VecWord {
  VecU64 even, odd;
};

template <class T>
inline __attribute__((always_inline)) T load_unaligned(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline __attribute__((always_inline)) void store_unaligned(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof v);
}

struct Lanes {
  using F = VecF;
  using U = VecU;
  using I = VecI;
  using Word = VecWord;

  static DDPM_FAST_HD F splat(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return F{x, x, x, x};
#endif
  }
  static DDPM_FAST_HD U bits(F x) { return (U)x; }
  static DDPM_FAST_HD F from_bits(U u) { return (F)u; }
  static DDPM_FAST_HD I to_signed(U u) { return (I)u; }
  static DDPM_FAST_HD U to_unsigned(I i) { return (U)i; }
  template <class T>
  static DDPM_FAST_HD T select(I mask, T yes, T no) {
    return mask ? yes : no;
  }
  static DDPM_FAST_HD I has_bit(U u, uint32_t bit) { return (u & bit) != 0u; }
  static DDPM_FAST_HD U fold(U w) { return w < ~w ? w : ~w; }
  static DDPM_FAST_HD F from_int(I i) { return __builtin_convertvector(i, F); }
  static DDPM_FAST_HD F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    F out;
    for (int i = 0; i < kWidth; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
#endif
  }
  static DDPM_FAST_HD F sqrt(F x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    F out;
    for (int i = 0; i < kWidth; ++i) out[i] = __builtin_sqrtf(x[i]);
    return out;
#endif
  }

  static DDPM_FAST_HD F at_least(F x, F lo) { return x <= lo ? lo : x; }
  static DDPM_FAST_HD F at_most(F x, F hi) { return x > hi ? hi : x; }
  static DDPM_FAST_HD F above(F x, F lo) {
#if defined(__AVX512F__)
    return _mm512_max_ps(lo, x);  // the second where one is NaN
#elif defined(__AVX2__)
    return _mm256_max_ps(lo, x);
#else
    return at_least(x, lo);
#endif
  }
  static DDPM_FAST_HD F below(F x, F hi) {
#if defined(__AVX512F__)
    return _mm512_min_ps(hi, x);
#elif defined(__AVX2__)
    return _mm256_min_ps(hi, x);
#else
    return at_most(x, hi);
#endif
  }

  static DDPM_FAST_HD VecU64 mul_low_halves(VecU64 a, uint32_t m) {
#if defined(__AVX512F__)
    return (VecU64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (VecU64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (VecU64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
    return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(m);
#endif
  }
  static DDPM_FAST_HD VecU64 xor_low_halves(VecU64 a, VecU64 b, uint32_t key) {
#if defined(__AVX512F__)
    return (VecU64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, _mm512_set1_epi64(key), 0x96);
#else
    return a ^ b ^ static_cast<uint64_t>(key);
#endif
  }
  static DDPM_FAST_HD void mul_hi_lo(uint32_t m, Word w, Word& hi, Word& lo) {
    lo.even = mul_low_halves(w.even, m);
    lo.odd = mul_low_halves(w.odd, m);
    hi.even = lo.even >> 32;
    hi.odd = lo.odd >> 32;
  }
  static DDPM_FAST_HD Word xor3(Word a, Word b, uint32_t key) {
    return {xor_low_halves(a.even, b.even, key), xor_low_halves(a.odd, b.odd, key)};
  }
  static DDPM_FAST_HD U pack(Word w) {
#if defined(__AVX512F__)
    const __m512 even = _mm512_castsi512_ps((__m512i)w.even);
    return (U)_mm512_mask_moveldup_ps(even, 0xAAAA, _mm512_castsi512_ps((__m512i)w.odd));
#elif defined(__AVX2__)
    const __m256 odd = _mm256_moveldup_ps(_mm256_castsi256_ps((__m256i)w.odd));
    return (U)_mm256_blend_ps(_mm256_castsi256_ps((__m256i)w.even), odd, 0xAA);
#else
    return (U)((w.even & static_cast<uint64_t>(0xFFFFFFFFu)) | (w.odd << 32));
#endif
  }
  static DDPM_FAST_HD Word splat_word(uint32_t x) {
    return {VecU64{} + static_cast<uint64_t>(x), VecU64{} + static_cast<uint64_t>(x)};
  }

  // Lane p holds block first + (p % 4) * (kWidth / 4) + p / 4, the order that lets
  // store_interleaved write whole vectors.
  static DDPM_FAST_HD Word block_counters(uint32_t first) {
    VecU64 even{}, odd{};
    for (int i = 0; i < kWidth / 2; ++i) {
      even[i] = ((2 * i) % 4) * (kWidth / 4) + (2 * i) / 4;
      odd[i] = ((2 * i + 1) % 4) * (kWidth / 4) + (2 * i + 1) / 4;
    }
    return {even + static_cast<uint64_t>(first), odd + static_cast<uint64_t>(first)};
  }

  // out[4 b + k] = z_k[lane of block b]: a 4 x 4 transposition within each 128-bit quarter.
  static DDPM_FAST_HD void store_interleaved(float* out, F z0, F z1, F z2, F z3) {
#if defined(__AVX512F__)
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z0, z1));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z0, z1));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z2, z3));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z2, z3));
    _mm512_storeu_pd(out, _mm512_unpacklo_pd(a, c));
    _mm512_storeu_pd(out + kWidth, _mm512_unpackhi_pd(a, c));
    _mm512_storeu_pd(out + 2 * kWidth, _mm512_unpacklo_pd(b, d));
    _mm512_storeu_pd(out + 3 * kWidth, _mm512_unpackhi_pd(b, d));
#elif defined(__AVX2__)
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z0, z1));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z0, z1));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z2, z3));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z2, z3));
    _mm256_storeu_pd((double*)out, _mm256_unpacklo_pd(a, c));
    _mm256_storeu_pd((double*)(out + kWidth), _mm256_unpackhi_pd(a, c));
    _mm256_storeu_pd((double*)(out + 2 * kWidth), _mm256_unpacklo_pd(b, d));
    _mm256_storeu_pd((double*)(out + 3 * kWidth), _mm256_unpackhi_pd(b, d));
#else
    for (int lane = 0; lane < kWidth; ++lane) {
      float* block = out + 4 * ((lane % 4) * (kWidth / 4) + lane / 4);
      block[0] = z0[lane];
      block[1] = z1[lane];
      block[2] = z2[lane];
      block[3] = z3[lane];
    }
#endif
  }

  // AVX-512: the same bits as core/convert.h's form in two thirds of the instructions; with those a
  // bfloat16 step would be a tenth slower than a float32 one. NaN is taken to be quiet, as every
  // arithmetic result is.
  static DDPM_FAST_HD F load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
    const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    return (F)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, high_word_positions(), halves);
#else
    return float_from_bf16<Lanes>(__builtin_convertvector(load_unaligned<VecU16>(p), U));
#endif
  }
  static DDPM_FAST_HD void store_bf16(uint16_t* p, F x) {
#if defined(__AVX512F__)
    const __m512i packed = _mm512_permutexvar_epi16(high_words(), round_to_high_words(x));
    _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(packed));
#elif defined(__AVX2__)
    const __m256i bits = (__m256i)bf16_from_float<Lanes>(x);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
    store_unaligned(p, __builtin_convertvector(bf16_from_float<Lanes>(x), VecU16));
#endif
  }
  // The same for two vectors at a time, half the shuffles.
  static DDPM_FAST_HD void load_bf16_pair(const uint16_t* p, F& a, F& b) {
#if defined(__AVX512F__)
    const __m512i halves = _mm512_loadu_si512(p);
    const __m512i second = _mm512_add_epi16(high_word_positions(), _mm512_set1_epi16(kWidth));
    a = (F)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, high_word_positions(), halves);
    b = (F)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, second, halves);
#else
    a = load_bf16(p);
    b = load_bf16(p + kWidth);
#endif
  }
  static DDPM_FAST_HD void store_bf16_pair(uint16_t* p, F a, F b) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(
        p, _mm512_permutex2var_epi16(round_to_high_words(a), high_words(), round_to_high_words(b)));
#else
    store_bf16(p, a);
    store_bf16(p + kWidth, b);
#endif
  }
#if defined(__AVX512F__)
  static DDPM_FAST_HD __m512i round_to_high_words(F x) {
    const __m512i u = (__m512i)x;
    const __mmask16 odd = _mm512_mask_test_epi32_mask(numbers(x), u, _mm512_set1_epi32(0x10000));
    const __m512i r = _mm512_mask_add_epi32(u, numbers(x), u, _mm512_set1_epi32(0x7FFF));
    return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
  }
  // As 16-bit positions: word i / 2 at every odd i; word 2 i + 1 of a pair of vectors at i.
  static DDPM_FAST_HD __m512i high_word_positions() {
    VecU v{};
    for (int i = 0; i < 16; ++i) v[i] = static_cast<uint32_t>(i) << 16;
    return (__m512i)v;
  }
  static DDPM_FAST_HD __m512i high_words() {
    VecU v{};
    for (uint32_t i = 0; i < 16; ++i) v[i] = (4 * i + 1) | (4 * i + 3) << 16;
    return (__m512i)v;
  }
#endif
  static DDPM_FAST_HD F load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    F out;
    const VecU16 halves = load_unaligned<VecU16>(p);
    for (int i = 0; i < kWidth; ++i) out[i] = float_from_half(halves[i]);
    return out;
#endif
  }
  static DDPM_FAST_HD void store_half(uint16_t* p, F x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    VecU16 halves;
    for (int i = 0; i < kWidth; ++i) halves[i] = half_from_float(x[i]);
    store_unaligned(p, halves);
#endif
  }
  static DDPM_FAST_HD F load_u8(const uint8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_unaligned<VecU8>(p), I), F);
#endif
  }

  // Which lanes have held numbers, and no NaN, so far.
#if defined(__AVX512F__)
  using Numbers = __mmask16;
  static DDPM_FAST_HD Numbers all_numbers() { return 0xFFFF; }
  static DDPM_FAST_HD Numbers numbers(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q); }
  static DDPM_FAST_HD bool any_nan(Numbers n) { return n != 0xFFFF; }
#else
  using Numbers = I;
  static DDPM_FAST_HD Numbers all_numbers() { return ~I{}; }
  static DDPM_FAST_HD Numbers numbers(F x) { return x == x; }
  static DDPM_FAST_HD bool any_nan(Numbers n) {
    int32_t all = -1;
    for (int i = 0; i < kWidth; ++i) all &= n[i];
    return all != -1;
  }
#endif
};

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
