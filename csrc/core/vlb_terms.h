// A term of the variational bound for each sample, in bits per dimension, and its gradient.
// With ratio = log of q's variance over p's, t > 0:
//   KL = 1/2 (e^ratio - 1 - ratio + precision e^ratio (x_0 - x0_hat)^2)     (Ho et al. 2020, eq. 5)
// and at t = 0 the decoder's negative log-likelihood (decoder.h). x_t and x0_hat are made as in
// add_noise.h and reverse_step.h of x_0, m and an eps that is redrawn. Reads 8 bytes an element in
// float32 (12 with learned variances), and writes as many of gradient as it reads of the model.
// Sums are taken in the order that denoising_loss.h describes.
#pragma once

#include "add_noise.h"
#include "denoising_loss.h"
#include "exp.h"
#include "reverse_step.h"

namespace ddpm_fast {

// One timestep of ddpm_fast/vlb_table.py.
struct VlbRow {
  float signal, sigma;
  float r, c_x, c_m;
  float precision;
  float ratio_min, ratio_max;
  float log_variance;
};
static_assert(sizeof(VlbRow) == 9 * sizeof(float), "a row is nine floats in memory");

// In the order of Variance in ddpm_fast/schedule.py.
enum class VlbVariance : int { kFixedSmall = 0, kFixedLarge = 1, kLearned = 2, kLearnedRange = 3 };

DDPM_FAST_HD bool is_learned(VlbVariance variance) {
  return variance == VlbVariance::kLearned || variance == VlbVariance::kLearnedRange;
}

enum class Cdf : int { kExact = 0, kTanh = 1 };

struct VlbTermsParams {
  const void* model_output;  // [samples, channels or, where the variance is learned, 2 channels, …]
  const void* x0;
  const void* noise;     // or null: drawn here
  void* gradient;        // like model_output, or null
  float gradient_scale;  // what the gradient is multiplied by
  float* total;          // [samples]: the weighted sum
  float* parts;    // [3, samples]: the regression (0 unless hybrid), the term, (x_0 - x0_hat)^2
  float* scratch;  // where a GPU leaves shares of the sums, three floats each
  DType model_dtype, x0_dtype, noise_dtype;
  Shape shape;  // of x_0
  NoiseSource source;
  DrawSource draw;
  const VlbRow* rows;  // [num_steps]
  int64_t num_steps;
  int64_t t;          // one timestep for all samples, or
  const int64_t* ts;  // [samples]
  Prediction prediction;
  VlbVariance variance;
  float lo, hi;
  Cdf cdf;
  bool hybrid;                  // adds the regression, whose gradient alone reaches m
  const float* simple_weights;  // [samples], or null: 1
  const float* vlb_weights;

  DDPM_FAST_HD float simple_weight(int64_t sample) const {
    return simple_weights != nullptr ? simple_weights[sample] : 1.0f;
  }
  DDPM_FAST_HD float vlb_weight(int64_t sample) const {
    return vlb_weights != nullptr ? vlb_weights[sample] : 1.0f;
  }
};

constexpr float kBitsPerNat = 0x1.715476p+0f;

// The log of q's variance over p's, of the model's v, kept in the range of exp, and its derivative
// inside that range. NaN passes.
template <class V>
DDPM_FAST_HD typename V::F log_ratio(const VlbRow& row, VlbVariance variance, typename V::F v) {
  if (!is_learned(variance)) return V::splat(row.ratio_min);
  typename V::F ratio = V::splat(row.log_variance) - v;
  if (variance == VlbVariance::kLearnedRange) {
    const typename V::F half = V::splat(0.5f * (row.ratio_max - row.ratio_min));
    ratio = V::fma(v + V::splat(1.0f), half, V::splat(row.ratio_min));
  }
  return V::at_most(V::at_least(ratio, V::splat(-87.0f)), V::splat(87.0f));
}
DDPM_FAST_HD float log_ratio_by_v(const VlbRow& row, VlbVariance variance) {
  return variance == VlbVariance::kLearned ? -1.0f : 0.5f * (row.ratio_max - row.ratio_min);
}

// A KL in nats and what it changes by with x0_hat and with the ratio. error = x_0 - x0_hat.
template <class V>
struct KlTerm {
  typename V::F nats, by_x0_hat, by_ratio;

  DDPM_FAST_HD KlTerm(const VlbRow& row, typename V::F ratio, typename V::F error) {
    using F = typename V::F;
    F e, excess;  // e^ratio, and e^ratio - 1 - ratio
    exp_with_excess<V>(ratio, e, excess);
    const F scaled = V::splat(row.precision) * e * error;
    const F half = V::splat(0.5f);
    nats = half * V::fma(scaled, error, excess);
    by_x0_hat = -scaled;
    by_ratio = half * V::fma(scaled, error, excess + ratio);
  }
};

}  // namespace ddpm_fast
