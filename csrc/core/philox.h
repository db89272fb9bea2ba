// Philox4x32-10: four 32-bit words as a pure function of a 128-bit counter and a 64-bit key.
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
#pragma once

#include "lanes.h"

namespace ddpm_fast {

// The address of a sample's noise (docs/noise.md): key = seed; counter = (e >> 2, draw, sample).
struct NoiseKey {
  uint64_t seed;
  uint64_t sample;
  uint32_t draw;  // stream << 24 | index
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;  // sqrt(3) - 1

// c: in, the counter; out, the four random words.
template <class V>
DDPM_FAST_HD void philox4x32_10(typename V::Word (&c)[4], uint32_t k0, uint32_t k1) {
  using Word = typename V::Word;
  DDPM_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word hi0, lo0, hi1, lo1;
    V::mul_hi_lo(kPhiloxM0, c[0], hi0, lo0);
    V::mul_hi_lo(kPhiloxM1, c[2], hi1, lo1);
    c[0] = V::xor3(hi1, c[1], k0);
    c[1] = lo1;
    c[2] = V::xor3(hi0, c[3], k1);
    c[3] = lo0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

}  // namespace ddpm_fast
