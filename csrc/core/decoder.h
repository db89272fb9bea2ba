// The discretised Gaussian decoder, -log of the probability of a pixel's bin (Ho et al. 2020,
// eq. 13): Phi(z+) - Phi(z-) with z+- = (x_0 - mean +- 1/255) / std, the outermost bins reaching to
// infinity, clamped at 1e-12. Real is double on a CPU; a GPU, where only the samples at t = 0 come
// here, takes float.
#pragma once

#include "vlb_terms.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace ddpm_fast {

template <class Real>
struct DecoderTerm {
  Real nats, by_mean, by_log_std;

  DDPM_FAST_HD DecoderTerm(Real x0, Real mean, Real log_std, Cdf cdf) {
#if !defined(__CUDACC__)
    using std::exp;
    using std::log;
#endif
    Real inverse_std, upper, lower;  // the bin's ends, in standard deviations from the mean
    if constexpr (kNarrow) {         // 1/255 in two parts; past 14 nothing is left of either tail
      inverse_std = exp_clamped<ScalarLanes>(-log_std);
      const Real half_bin = 0x1.010102p-8f, rest = inverse_std * -0x1.fdfdfep-33f;
      upper = ScalarLanes::fma(inverse_std, x0 - mean + half_bin, rest);
      lower = ScalarLanes::fma(inverse_std, x0 - mean - half_bin, -rest);
      upper = clip<ScalarLanes>(upper, -14.0f, 14.0f);
      lower = clip<ScalarLanes>(lower, -14.0f, 14.0f);
    } else {
      const Real half_bin = Real(1) / Real(255);
      inverse_std = exp(-log_std);
      upper = inverse_std * (x0 - mean + half_bin);
      lower = inverse_std * (x0 - mean - half_bin);
    }
    const bool lowest = x0<Real(-0.999), highest = x0> Real(0.999);
    Real p;
    if (!kNarrow && cdf == Cdf::kTanh) {
      p = (highest ? Real(1) : below_tanh(upper)) - (lowest ? Real(0) : below_tanh(lower));
    } else {  // from the tail that both ends share, where neither is near 1
      const bool flip = !lowest && (highest || lower > 0);
      p = below(flip ? -lower : upper, cdf);
      if (!(lowest || highest)) p -= below(flip ? -upper : lower, cdf);
    }
    const bool clamped = p < Real(1e-12);
    if (clamped) p = Real(1e-12);  // NaN passes
    const Real at_upper = highest ? Real(0) : density(upper, cdf);
    const Real at_lower = lowest ? Real(0) : density(lower, cdf);
    nats = -log(p);
    by_mean = clamped ? Real(0) : inverse_std * (at_upper - at_lower) / p;
    by_log_std = clamped ? Real(0) : (upper * at_upper - lower * at_lower) / p;
  }

 private:
  // float32, whose rounded arguments would cost the functions below z^2 times its precision.
  static constexpr bool kNarrow = sizeof(Real) == sizeof(float);

  static DDPM_FAST_HD Real below(Real z, Cdf cdf) {
#if !defined(__CUDACC__)
    using std::erfc;
    using std::exp;
#endif
    if (cdf == Cdf::kTanh) return z > 0 ? 1 - tail_tanh(z) : tail_tanh(z);
    const Real y = Real(-0.70710678118654752440) * z;
    if constexpr (kNarrow) {  // erfc(y + rest) by its derivative
      const Real rest = ScalarLanes::fma(-0x1.6a09e6p-1f, z, -y) + -0x1.9fcef4p-27f * z;
      return Real(0.5) * erfc(y) - Real(0.56418958354775628695) * exp(-y * y) * rest;
    }
    return Real(0.5) * erfc(y);
  }
  // The approximation that improved-diffusion makes.
  static constexpr Real kRoot = Real(0.79788456080286535588);  // sqrt(2 / pi)
  static constexpr Real kCubic = Real(0.044715);
  static DDPM_FAST_HD Real tanh_of(Real z) {
#if !defined(__CUDACC__)
    using std::tanh;
#endif
    return tanh(kRoot * (z + kCubic * z * z * z));
  }
  static DDPM_FAST_HD Real below_tanh(Real z) { return Real(0.5) * (1 + tanh_of(z)); }
  // Below -|z|, with all its digits.
  static DDPM_FAST_HD Real tail_tanh(Real z) {
#if !defined(__CUDACC__)
    using std::exp;
#endif
    const Real distance = z < 0 ? -z : z;
    const Real e = exp(-2 * kRoot * distance * (1 + kCubic * z * z));
    return e / (1 + e);
  }
  static DDPM_FAST_HD Real density(Real z, Cdf cdf) {
#if !defined(__CUDACC__)
    using std::exp;
#endif
    if (cdf == Cdf::kExact) {
      const Real half = Real(-0.5) * z, exponent = half * z;
      Real bell = exp(exponent);
      if constexpr (kNarrow) {
        bell = ScalarLanes::fma(bell, ScalarLanes::fma(half, z, -exponent), bell);
      }
      return Real(0.39894228040143267794) * bell;
    }
    const Real slope = kRoot * (1 + 3 * kCubic * z * z);
    if constexpr (kNarrow) {
      const Real tail = tail_tanh(z);
      return 2 * slope * tail * (1 - tail);
    }
    const Real tanh_z = tanh_of(z);
    return Real(0.5) * slope * (1 - tanh_z * tanh_z);
  }
};

}  // namespace ddpm_fast
