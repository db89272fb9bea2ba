// What a model is trained by: w mean((target - m)^2) of each sample, with the target eps, x_0 or
// v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Ho et al. 2020, eq. 14; Salimans & Ho 2022), whose eps
// is redrawn, and the gradient 2 w / D (m - target). Moves 8 bytes an element in float32, 12 where
// the target has x_0 in it: reads m (and x_0), writes the gradient.
//
// A sum has one order, whatever the threads and the batch: elements in memory order are added up in
// fixed places of fixed shares of a sample, and the shares one after the other.
#pragma once

#include "convert.h"
#include "noise.h"

namespace ddpm_fast {

// What a model predicts, in the order of Prediction in ddpm_fast/schedule.py.
enum class Prediction : int { kEpsilon = 0, kSample = 1, kV = 2 };

struct DenoisingLossParams {
  const void* model_output;  // [samples, channels or 2 channels, pixels]: the first half counts
  const void* x0;            // or null, where the target is eps
  const void* noise;         // or null: drawn here
  void* gradient;            // like model_output, or null
  float gradient_scale;      // what the gradient is multiplied by
  float* loss;               // [samples]
  float* scratch;            // where a GPU leaves shares of the sums, one float each
  DType model_dtype, x0_dtype, noise_dtype;
  bool doubled;  // the model's output has a second half, whose gradient is 0
  Shape shape;   // of x_0
  NoiseSource source;
  DrawSource draw;
  const float* forward_weights;  // [num_steps, 2]: sqrt(abar), sqrt(1 - abar)
  int64_t num_steps;
  int64_t t;          // one timestep for all samples, or
  const int64_t* ts;  // [samples]
  Prediction prediction;
  const float* weights;  // [samples], or null: 1

  DDPM_FAST_HD float weight(int64_t sample) const {
    return weights != nullptr ? weights[sample] : 1.0f;
  }
};

// m - target. x_0 is not read where the target is eps, z not where it is x_0.
template <class V>
DDPM_FAST_HD typename V::F residual(Prediction prediction, typename V::F signal,
                                    typename V::F sigma, typename V::F m, typename V::F x0,
                                    typename V::F z) {
  if (prediction == Prediction::kEpsilon) return m - z;
  if (prediction == Prediction::kSample) return m - x0;
  return m - V::fma(signal, z, -(sigma * x0));
}

}  // namespace ddpm_fast
