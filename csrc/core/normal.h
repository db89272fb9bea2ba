// Standard normals from pairs of random words, to the last bit the same wherever fma, sqrt and
// int-to-float conversion round to nearest (docs/noise.md, version 1). Box and Muller, 1958:
//   U = (w_even + 1/2) 2^-32,  r = sqrt(-2 ln U),  theta = 2 pi w_odd 2^-32,
//   z_even = r cos(theta),  z_odd = r sin(theta).
// Every product below feeds an fma operand, another product or an exact operation, never an
// addition: a compiler that contracts a*b + c finds nothing to change.
#pragma once

#include "lanes.h"

namespace ddpm_fast {

// -2 ln U. The polynomial Q has ln(1+s) = s + s^2 Q(s) on [sqrt(1/2) - 1, sqrt(2) - 1]; its
// coefficients carry the factor -2 and minimise the error of z, 5.3e-8 before rounding.
template <class V>
DDPM_FAST_HD typename V::F minus_two_log_uniform(typename V::U w) {
  using F = typename V::F;
  using U = typename V::U;
  const auto low = V::to_signed(w) > -1;
  const U v = V::fold(w);  // the smaller of w and ~w: < 2^31, so the signed conversion is right
  // min(U, 1 - U), and U rounded
  const F u = V::fma(V::from_int(V::to_signed(v)), V::splat(0x1p-32f), V::splat(0x1p-33f));
  const F t = V::select(low, u, V::splat(1.0f) - u);

  // t = 2^k f with f in [sqrt(1/2), sqrt(2)); k stays where it lies in the exponent's bits.
  const U k = (V::bits(t) - 0x3F3504F3u) & 0xFF800000u;
  const F f = V::from_bits(V::bits(t) - k);
  // Near U = 1 the rounding of t would cost 5e-5 in z: there U - 1 = -u is known to full precision.
  const F s = V::select(k == 0u, -u, f - V::splat(1.0f));

  F q = V::splat(0x1.a359bcp-3f);
  q = V::fma(q, s, V::splat(-0x1.4ec5b2p-2f));
  q = V::fma(q, s, V::splat(0x1.615c82p-2f));
  q = V::fma(q, s, V::splat(-0x1.9737dcp-2f));
  q = V::fma(q, s, V::splat(0x1.ff5b64p-2f));
  q = V::fma(q, s, V::splat(-0x1.555b1cp-1f));
  q = V::fma(q, s, V::splat(0x1.00007ep+0f));
  const F minus_two_log_f = V::fma(q, s * s, V::splat(-2.0f) * s);
  const F exponent = V::from_int(V::to_signed(k));                       // 2^23 k
  return V::fma(exponent, V::splat(-0x1.62e430p-23f), minus_two_log_f);  // -2 ln 2
}

template <class V>
DDPM_FAST_HD void box_muller(typename V::U w_even, typename V::U w_odd, typename V::F& z_even,
                             typename V::F& z_odd) {
  using F = typename V::F;
  using U = typename V::U;
  const F r = V::sqrt(minus_two_log_uniform<V>(w_even));

  // y in [-1/2, 1/2]: the angle from the nearest quarter turn, in quarter turns.
  const F y = V::from_int(V::to_signed(w_odd << 2)) * V::splat(0x1p-32f);
  const F y2 = y * y;
  F sin_y = V::splat(-0x1.2cf5d4p-8f);
  sin_y = V::fma(sin_y, y2, V::splat(0x1.465a3ep-4f));
  sin_y = V::fma(sin_y, y2, V::splat(-0x1.4abba8p-1f));
  sin_y = V::fma(sin_y, y2, V::splat(-0x1.18faf8p-24f));  // pi/2 = this + the next
  sin_y = V::fma(y, V::splat(0x1.921fb6p+0f), y * sin_y);
  F cos_y = V::splat(0x1.d9f7bcp-11f);
  cos_y = V::fma(cos_y, y2, V::splat(-0x1.55c664p-6f));
  cos_y = V::fma(cos_y, y2, V::splat(0x1.03c1dep-2f));
  cos_y = V::fma(cos_y, y2, V::splat(-0x1.3bd3ccp+0f));
  cos_y = V::fma(cos_y, y2, V::splat(1.0f));

  // The quadrant: bit 31 of `turn` says a half turn, bit 30 a quarter more.
  const U turn = w_odd + 0x20000000u;
  const F radius = V::from_bits(V::bits(r) ^ (turn & 0x80000000u));
  const auto quarter = V::has_bit(turn, 0x40000000u);
  z_even = radius * V::select(quarter, -sin_y, cos_y);
  z_odd = radius * V::select(quarter, cos_y, sin_y);
}

}  // namespace ddpm_fast
