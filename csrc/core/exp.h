// exp(x) for the standard deviations of learned variances, the same bits on every backend.
// exp(x) = 2^k exp(f), k = round(x / ln 2), |f| <= ln 2 / 2; relative error below 1.2e-7.
#pragma once

#include "lanes.h"

namespace ddpm_fast {

// exp(x) and exp(x) - 1 - x, the second to full precision near 0 as well, for x in [-87, 87], the
// range of float32 results; NaN passes through.
template <class V>
DDPM_FAST_HD void exp_with_excess(typename V::F x, typename V::F& exp, typename V::F& excess) {
  using F = typename V::F;
  using U = typename V::U;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const F shifted = V::fma(x, V::splat(0x1.715476p+0f), V::splat(0x1.8p+23f));
  const F k = shifted - V::splat(0x1.8p+23f);
  F f = V::fma(k, V::splat(-0x1.62e400p-1f), x);  // ln 2 in two parts: the first product is exact
  f = V::fma(k, V::splat(-0x1.7f7d1cp-20f), f);
  F e = V::splat(0x1.6db414p-10f);
  e = V::fma(e, f, V::splat(0x1.123b46p-7f));
  e = V::fma(e, f, V::splat(0x1.55545ep-5f));
  e = V::fma(e, f, V::splat(0x1.555490p-3f));
  e = V::fma(e, f, V::splat(0.5f));  // (exp(f) - 1 - f) / f^2
  const F near_zero = e * f * f;
  const F minus_one = V::fma(e * f, f, f);
  const U exponent = V::bits(shifted) << 23;
  exp = V::from_bits(exponent + 0x3F800000u) * (minus_one + V::splat(1.0f));
  excess = V::select(k == V::splat(0.0f), near_zero, exp - V::splat(1.0f) - x);
}

// exp(x) for x kept in that range.
template <class V>
DDPM_FAST_HD typename V::F exp_clamped(typename V::F x) {
  x = V::select(x < V::splat(-87.0f), V::splat(-87.0f), x);
  x = V::select(x > V::splat(87.0f), V::splat(87.0f), x);
  typename V::F exp, excess;
  exp_with_excess<V>(x, exp, excess);
  return exp;
}

}  // namespace ddpm_fast
