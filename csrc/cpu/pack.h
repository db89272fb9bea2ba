// N vectors that take each operation of core/ together, one after the other in program order. A
// chain of dependent operations leaves the processor waiting, and its scheduler is too small to
// find the next chain by itself (granule.h has the figures).
#pragma once

#include "simd.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <class T, int N>
struct Pack {
  T v[N];
};

#define DDPM_FAST_PACK_UNARY(op)                      \
  template <class T, int N>                           \
  DDPM_FAST_HD Pack<T, N> operator op(Pack<T, N> a) { \
    for (int i = 0; i < N; ++i) a.v[i] = op a.v[i];   \
    return a;                                         \
  }
#define DDPM_FAST_PACK_BINARY(op)                                   \
  template <class T, int N>                                         \
  DDPM_FAST_HD Pack<T, N> operator op(Pack<T, N> a, Pack<T, N> b) { \
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b.v[i];          \
    return a;                                                       \
  }
#define DDPM_FAST_PACK_SCALAR(op)                          \
  template <class T, int N, class S>                       \
  DDPM_FAST_HD Pack<T, N> operator op(Pack<T, N> a, S b) { \
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b;      \
    return a;                                              \
  }
#define DDPM_FAST_PACK_COMPARE(op)                                     \
  template <class T, int N>                                            \
  DDPM_FAST_HD Pack<VecI, N> operator op(Pack<T, N> a, Pack<T, N> b) { \
    Pack<VecI, N> mask;                                                \
    for (int i = 0; i < N; ++i) mask.v[i] = a.v[i] op b.v[i];          \
    return mask;                                                       \
  }                                                                    \
  template <class T, int N, class S>                                   \
  DDPM_FAST_HD Pack<VecI, N> operator op(Pack<T, N> a, S b) {          \
    Pack<VecI, N> mask;                                                \
    for (int i = 0; i < N; ++i) mask.v[i] = a.v[i] op b;               \
    return mask;                                                       \
  }

DDPM_FAST_PACK_UNARY(-)
DDPM_FAST_PACK_UNARY(~)
DDPM_FAST_PACK_BINARY(+)
DDPM_FAST_PACK_BINARY(-)
DDPM_FAST_PACK_BINARY(*)
DDPM_FAST_PACK_BINARY(^)
DDPM_FAST_PACK_SCALAR(+)
DDPM_FAST_PACK_SCALAR(-)
DDPM_FAST_PACK_SCALAR(&)
DDPM_FAST_PACK_SCALAR(<<)
DDPM_FAST_PACK_SCALAR(>>)
DDPM_FAST_PACK_COMPARE(<)
DDPM_FAST_PACK_COMPARE(>)
DDPM_FAST_PACK_COMPARE(==)
DDPM_FAST_PACK_COMPARE(!=)

#undef DDPM_FAST_PACK_UNARY
#undef DDPM_FAST_PACK_BINARY
#undef DDPM_FAST_PACK_SCALAR
#undef DDPM_FAST_PACK_COMPARE

template <int N>
struct PackLanes {
  using F = Pack<VecF, N>;
  using U = Pack<VecU, N>;
  using I = Pack<VecI, N>;
  using Word = Pack<VecWord, N>;

  template <class To, class From, class Function>
  static DDPM_FAST_HD To each(const From& a, Function f) {
    To out;
    for (int i = 0; i < N; ++i) out.v[i] = f(a.v[i]);
    return out;
  }

  static DDPM_FAST_HD F splat(float x) {
    F out;
    for (int i = 0; i < N; ++i) out.v[i] = Lanes::splat(x);
    return out;
  }
  static DDPM_FAST_HD U bits(F x) { return each<U>(x, Lanes::bits); }
  static DDPM_FAST_HD F from_bits(U u) { return each<F>(u, Lanes::from_bits); }
  static DDPM_FAST_HD I to_signed(U u) { return each<I>(u, Lanes::to_signed); }
  static DDPM_FAST_HD U to_unsigned(I i) { return each<U>(i, Lanes::to_unsigned); }
  static DDPM_FAST_HD I has_bit(U u, uint32_t bit) {
    I mask;
    for (int i = 0; i < N; ++i) mask.v[i] = Lanes::has_bit(u.v[i], bit);
    return mask;
  }
  static DDPM_FAST_HD U fold(U w) { return each<U>(w, Lanes::fold); }
  static DDPM_FAST_HD F from_int(I i) { return each<F>(i, Lanes::from_int); }
  static DDPM_FAST_HD F sqrt(F x) { return each<F>(x, Lanes::sqrt); }
  static DDPM_FAST_HD F fma(F a, F b, F c) {
    for (int i = 0; i < N; ++i) a.v[i] = Lanes::fma(a.v[i], b.v[i], c.v[i]);
    return a;
  }
  static DDPM_FAST_HD F above(F x, F lo) {
    for (int i = 0; i < N; ++i) x.v[i] = Lanes::above(x.v[i], lo.v[i]);
    return x;
  }
  static DDPM_FAST_HD F below(F x, F hi) {
    for (int i = 0; i < N; ++i) x.v[i] = Lanes::below(x.v[i], hi.v[i]);
    return x;
  }
  template <class T>
  static DDPM_FAST_HD T select(I mask, T yes, T no) {
    for (int i = 0; i < N; ++i) yes.v[i] = Lanes::select(mask.v[i], yes.v[i], no.v[i]);
    return yes;
  }
  static DDPM_FAST_HD void mul_hi_lo(uint32_t m, Word w, Word& hi, Word& lo) {
    for (int i = 0; i < N; ++i) Lanes::mul_hi_lo(m, w.v[i], hi.v[i], lo.v[i]);
  }
  static DDPM_FAST_HD Word xor3(Word a, Word b, uint32_t key) {
    for (int i = 0; i < N; ++i) a.v[i] = Lanes::xor3(a.v[i], b.v[i], key);
    return a;
  }
};

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
