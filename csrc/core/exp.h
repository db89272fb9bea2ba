// exp(x) for the standard deviations of learned variances, the same bits on every backend.
// exp(x) = 2^k exp(f), k = round(x / ln 2), |f| <= ln 2 / 2; relative error below 1.2e-7.
#pragma once

#include "lanes.h"

namespace ddpm_fast {

// x is kept in [-87, 87], the range of float32 results; NaN passes through.
template <class V>
DDPM_FAST_HD typename V::F exp_clamped(typename V::F x) {
  using F = typename V::F;
  using U = typename V::U;
  x = V::select(x < V::splat(-87.0f), V::splat(-87.0f), x);
  x = V::select(x > V::splat(87.0f), V::splat(87.0f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const F shifted = V::fma(x, V::splat(0x1.715476p+0f), V::splat(0x1.8p+23f));
  const F k = shifted - V::splat(0x1.8p+23f);
  F f = V::fma(k, V::splat(-0x1.62e400p-1f), x);  // ln 2 in two parts: the first product is exact
  f = V::fma(k, V::splat(-0x1.7f7d1cp-20f), f);
  F e = V::splat(0x1.6db414p-10f);
  e = V::fma(e, f, V::splat(0x1.123b46p-7f));
  e = V::fma(e, f, V::splat(0x1.55545ep-5f));
  e = V::fma(e, f, V::splat(0x1.555490p-3f));
  e = V::fma(e, f, V::splat(0.5f));
  e = V::fma(e * f, f, f);
  const U exponent = V::bits(shifted) << 23;
  return V::from_bits(exponent + 0x3F800000u) * (e + V::splat(1.0f));
}

}  // namespace ddpm_fast
