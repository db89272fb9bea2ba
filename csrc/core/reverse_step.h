// One step of the reverse process, for every sampler that is affine in (x0_hat, x, m, z):
//   x0_hat = clip(r * fma(c_m, m, c_x * x), lo, hi)
//   x'     = fma(b_0, x0_hat, fma(b_x, x, fma(b_m, m, sigma * z)))
// (Ho et al. 2020, eqs. 7, 11 and 15; Song et al. 2021, eq. 12), in this order of operations.
// r is not multiplied out: at the last cosine steps it passes 1e4 and the two terms cancel.
// Moves 12 bytes an element in float32: reads x and m, writes x'.
#pragma once

#include "convert.h"
#include "exp.h"
#include "noise.h"

namespace ddpm_fast {

// One row of a StepTable.
struct StepRow {
  float r, c_x, c_m;
  float b_0, b_x, b_m;
  float sigma;
  float log_var_min, log_var_max;
};
static_assert(sizeof(StepRow) == 9 * sizeof(float), "a row is nine floats in memory");

// What the model's second half of channels, if it has one, means.
enum class Variance : int {
  kNone = 0,     // there is none
  kIgnored = 1,  // there is one, and the method takes no notice of it
  kLearned = 2,  // log sigma^2
  kLearnedRange =
      3,  // v in [-1, 1] between log_var_min and log_var_max (Nichol & Dhariwal, eq. 15)
};

DDPM_FAST_HD bool is_learned(Variance variance) {
  return variance == Variance::kLearned || variance == Variance::kLearnedRange;
}

struct ReverseStepParams {
  const void* x;
  const void* model_output;         // [samples, channels or 2 channels, pixels]
  const void* model_output_uncond;  // the same, or null: no guidance
  const void* x0;                   // takes the place of x0_hat before the clip, or null
  const void* noise;                // or null: drawn here
  void* out;                        // of x's dtype; may be x itself
  void* out_x0;                     // float32, or null
  void* out_lowp;                   // bfloat16 or float16: the same result, or null
  DType x_dtype, model_dtype, x0_dtype, noise_dtype, out_lowp_dtype;
  Shape shape;
  NoiseSource source;
  Variance variance;
  float lo, hi;
  float guidance_scale;
  const float* guidance_scales;  // [samples], [1] where the stride is 0, or null: one scale for all
  int64_t guidance_scales_stride;
  const StepRow* rows;
  const int64_t* timesteps;  // [num_rows]: the index of each row's draw
  int64_t num_rows;
  int64_t step;          // one row for all samples, or
  const int64_t* steps;  // [samples], [1] where the stride is 0
  int64_t steps_stride;
  int32_t* nan_step;  // lowered to the first row whose result holds a NaN, or null

  DDPM_FAST_HD int64_t step_of(int64_t sample) const {
    return steps != nullptr ? steps[sample * steps_stride] : step;
  }
  DDPM_FAST_HD float guidance_scale_of(int64_t sample) const {
    return guidance_scales != nullptr ? guidance_scales[sample * guidance_scales_stride]
                                      : guidance_scale;
  }
};

// Classifier-free guidance (Ho & Salimans 2022, in the form m_u + s (m_c - m_u)).
template <class V>
DDPM_FAST_HD typename V::F guided(typename V::F cond, typename V::F uncond, typename V::F scale) {
  return V::fma(scale, cond - uncond, uncond);
}

// NaN passes, as through torch.clamp. No bound is -0.
template <class V>
DDPM_FAST_HD typename V::F clip(typename V::F x, typename V::F lo, typename V::F hi) {
  return V::at_most(V::at_least(x, lo), hi);
}

template <class V>
DDPM_FAST_HD typename V::F predict_x0(const StepRow& row, typename V::F x, typename V::F m) {
  return V::splat(row.r) * V::fma(V::splat(row.c_m), m, V::splat(row.c_x) * x);
}

// The standard deviation that the model's own log-variance gives, times the row's sigma (0 or 1).
template <class V>
DDPM_FAST_HD typename V::F learned_sigma(const StepRow& row, Variance variance, typename V::F v) {
  using F = typename V::F;
  F log_var = v;
  if (variance == Variance::kLearnedRange) {
    const F fraction = V::fma(v, V::splat(0.5f), V::splat(0.5f));
    const F min = V::splat(row.log_var_min);
    log_var = V::fma(fraction, V::splat(row.log_var_max) - min, min);
  }
  return V::splat(row.sigma) * exp_clamped<V>(V::splat(0.5f) * log_var);
}

// noise: sigma * z, and +0 where sigma is 0.
template <class V>
DDPM_FAST_HD typename V::F step_to(const StepRow& row, typename V::F x0_hat, typename V::F x,
                                   typename V::F m, typename V::F noise) {
  return V::fma(V::splat(row.b_0), x0_hat,
                V::fma(V::splat(row.b_x), x, V::fma(V::splat(row.b_m), m, noise)));
}

}  // namespace ddpm_fast
