// The forward process in one step: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z
// (Ho et al. 2020, eq. 4), as fma(a, x_0, s * z). Reads x_0, writes x_t: 8 bytes an element in
// float32, 5 from uint8 pixels.
#pragma once

#include "convert.h"
#include "noise.h"

namespace ddpm_fast {

struct AddNoiseParams {
  const void* x0;
  const void* noise;  // of x0's layout, or null: drawn here
  void* out;
  DType x0_dtype, noise_dtype, out_dtype;
  Shape shape;
  NoiseSource source;
  DrawSource draw;
  const float* weights;  // [num_steps, 2]: sqrt(abar), sqrt(1 - abar)
  int64_t num_steps;
  int64_t t;          // one timestep for all samples, or
  const int64_t* ts;  // [samples]
};

// A pixel 0 .. 255 in [-1, 1]: (p - 127.5)/127.5, the reciprocal in two parts. Both ends are exact.
// `centred` is p - 127.5, exact in float32.
template <class V>
DDPM_FAST_HD typename V::F unit_from_pixel(typename V::F centred) {
  return V::fma(centred, V::splat(0x1.010102p-7f), centred * V::splat(-0x1.fdfdfep-32f));
}

template <class V>
DDPM_FAST_HD typename V::F q_sample(typename V::F signal, typename V::F sigma, typename V::F x0,
                                    typename V::F z) {
  return V::fma(signal, x0, sigma * z);
}

}  // namespace ddpm_fast
