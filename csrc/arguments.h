// The ops' arguments as Python passes them (addresses, sizes, codes) made into their parameters.
// Every backend takes the same ones, so that ddpm_fast/ops states them once.
#pragma once

#include "core/add_noise.h"
#include "core/conv2d.h"
#include "core/denoising_loss.h"
#include "core/group_norm_silu.h"
#include "core/randn.h"
#include "core/reverse_step.h"
#include "core/vlb_terms.h"

namespace ddpm_fast {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline NoiseSource noise_source(int64_t seed, uintptr_t seeds, uintptr_t sample_ids) {
  return {static_cast<uint64_t>(seed), pointer<int64_t>(seeds), pointer<int64_t>(sample_ids)};
}

inline DrawSource draw_source(uint32_t stream, int64_t index, uintptr_t indices) {
  return {stream, index, pointer<int64_t>(indices)};
}

inline RandnParams randn_params(uintptr_t out, int dtype, int64_t samples, int64_t channels,
                                int64_t pixels, bool channels_last, int64_t seed, uintptr_t seeds,
                                uintptr_t sample_ids, uint32_t stream, int64_t index,
                                uintptr_t indices) {
  RandnParams p{};
  p.out = pointer(out);
  p.dtype = static_cast<DType>(dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = noise_source(seed, seeds, sample_ids);
  p.draw = draw_source(stream, index, indices);
  return p;
}

inline AddNoiseParams add_noise_params(uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype,
                                       uintptr_t out, int out_dtype, int64_t samples,
                                       int64_t channels, int64_t pixels, bool channels_last,
                                       int64_t seed, uintptr_t seeds, uintptr_t sample_ids,
                                       uint32_t stream, int64_t index, uintptr_t indices,
                                       uintptr_t weights, int64_t num_steps, int64_t t,
                                       uintptr_t ts) {
  AddNoiseParams p{};
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.out = pointer(out);
  p.out_dtype = static_cast<DType>(out_dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = noise_source(seed, seeds, sample_ids);
  p.draw = draw_source(stream, index, indices);
  p.weights = pointer<float>(weights);
  p.num_steps = num_steps;
  p.t = t;
  p.ts = pointer<int64_t>(ts);
  return p;
}

inline ReverseStepParams reverse_step_params(
    uintptr_t x, int x_dtype, uintptr_t model_output, uintptr_t model_output_uncond,
    int model_dtype, uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype, uintptr_t out,
    uintptr_t out_x0, uintptr_t out_lowp, int out_lowp_dtype, int64_t samples, int64_t channels,
    int64_t pixels, bool channels_last, int64_t seed, uintptr_t seeds, uintptr_t sample_ids,
    int variance, float lo, float hi, float guidance_scale, uintptr_t guidance_scales,
    int64_t guidance_scales_stride, uintptr_t rows, uintptr_t timesteps, int64_t num_rows,
    int64_t step, uintptr_t steps, int64_t steps_stride, uintptr_t nan_step) {
  ReverseStepParams p{};
  p.x = pointer(x);
  p.x_dtype = static_cast<DType>(x_dtype);
  p.model_output = pointer(model_output);
  p.model_output_uncond = pointer(model_output_uncond);
  p.model_dtype = static_cast<DType>(model_dtype);
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.out = pointer(out);
  p.out_x0 = pointer(out_x0);
  p.out_lowp = pointer(out_lowp);
  p.out_lowp_dtype = static_cast<DType>(out_lowp_dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = noise_source(seed, seeds, sample_ids);
  p.variance = static_cast<Variance>(variance);
  p.lo = lo;
  p.hi = hi;
  p.guidance_scale = guidance_scale;
  p.guidance_scales = pointer<float>(guidance_scales);
  p.guidance_scales_stride = guidance_scales_stride;
  p.rows = pointer<StepRow>(rows);
  p.timesteps = pointer<int64_t>(timesteps);
  p.num_rows = num_rows;
  p.step = step;
  p.steps = pointer<int64_t>(steps);
  p.steps_stride = steps_stride;
  p.nan_step = pointer<int32_t>(nan_step);
  return p;
}

inline DenoisingLossParams denoising_loss_params(
    uintptr_t model_output, int model_dtype, bool doubled, uintptr_t x0, int x0_dtype,
    uintptr_t noise, int noise_dtype, uintptr_t gradient, float gradient_scale, uintptr_t loss,
    uintptr_t scratch, int64_t samples, int64_t channels, int64_t pixels, bool channels_last,
    int64_t seed, uintptr_t seeds, uintptr_t sample_ids, uint32_t stream, int64_t index,
    uintptr_t indices, uintptr_t forward_weights, int64_t num_steps, int64_t t, uintptr_t ts,
    int prediction, uintptr_t weights) {
  DenoisingLossParams p{};
  p.model_output = pointer(model_output);
  p.model_dtype = static_cast<DType>(model_dtype);
  p.doubled = doubled;
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.gradient = pointer(gradient);
  p.gradient_scale = gradient_scale;
  p.loss = pointer<float>(loss);
  p.scratch = pointer<float>(scratch);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = noise_source(seed, seeds, sample_ids);
  p.draw = draw_source(stream, index, indices);
  p.forward_weights = pointer<float>(forward_weights);
  p.num_steps = num_steps;
  p.t = t;
  p.ts = pointer<int64_t>(ts);
  p.prediction = static_cast<Prediction>(prediction);
  p.weights = pointer<float>(weights);
  return p;
}

inline VlbTermsParams vlb_terms_params(
    uintptr_t model_output, int model_dtype, uintptr_t x0, int x0_dtype, uintptr_t noise,
    int noise_dtype, uintptr_t gradient, float gradient_scale, uintptr_t total, uintptr_t parts,
    uintptr_t scratch, int64_t samples, int64_t channels, int64_t pixels, bool channels_last,
    int64_t seed, uintptr_t seeds, uintptr_t sample_ids, uint32_t stream, int64_t index,
    uintptr_t indices, uintptr_t rows, int64_t num_steps, int64_t t, uintptr_t ts, int prediction,
    int variance, float lo, float hi, int cdf, bool hybrid, uintptr_t simple_weights,
    uintptr_t vlb_weights) {
  VlbTermsParams p{};
  p.model_output = pointer(model_output);
  p.model_dtype = static_cast<DType>(model_dtype);
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.gradient = pointer(gradient);
  p.gradient_scale = gradient_scale;
  p.total = pointer<float>(total);
  p.parts = pointer<float>(parts);
  p.scratch = pointer<float>(scratch);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = noise_source(seed, seeds, sample_ids);
  p.draw = draw_source(stream, index, indices);
  p.rows = pointer<VlbRow>(rows);
  p.num_steps = num_steps;
  p.t = t;
  p.ts = pointer<int64_t>(ts);
  p.prediction = static_cast<Prediction>(prediction);
  p.variance = static_cast<VlbVariance>(variance);
  p.lo = lo;
  p.hi = hi;
  p.cdf = static_cast<Cdf>(cdf);
  p.hybrid = hybrid;
  p.simple_weights = pointer<float>(simple_weights);
  p.vlb_weights = pointer<float>(vlb_weights);
  return p;
}

inline GroupNormAffine group_norm_affine(uintptr_t weight, uintptr_t bias, uintptr_t emb,
                                         int64_t emb_stride, uintptr_t scale, int64_t scale_stride,
                                         uintptr_t shift, int64_t shift_stride) {
  GroupNormAffine a{};
  a.weight = pointer<float>(weight);
  a.bias = pointer<float>(bias);
  a.emb = pointer<float>(emb);
  a.emb_stride = emb_stride;
  a.scale = pointer<float>(scale);
  a.scale_stride = scale_stride;
  a.shift = pointer<float>(shift);
  a.shift_stride = shift_stride;
  return a;
}

// Strides follow the address that they belong to: sample, row, pixel.
inline GroupNormSiluParams group_norm_silu_params(
    uintptr_t x, int64_t x_sample, int64_t x_row, int64_t x_pixel, uintptr_t residual,
    int64_t residual_sample, int64_t residual_row, int64_t residual_pixel, uintptr_t sum_out,
    int64_t sum_sample, int64_t sum_row, int64_t sum_pixel, uintptr_t y, int64_t y_sample,
    int64_t y_row, int64_t y_pixel, int dtype, int64_t samples, int64_t channels, int64_t groups,
    int64_t rows, int64_t cols, bool channels_last, uintptr_t weight, uintptr_t bias, uintptr_t emb,
    int64_t emb_stride, uintptr_t scale, int64_t scale_stride, uintptr_t shift,
    int64_t shift_stride, float eps, bool silu, uintptr_t mean, uintptr_t rstd, uintptr_t scratch,
    int64_t chunk, int64_t chunks) {
  GroupNormSiluParams p{};
  p.x = pointer(x);
  p.x_strides = {x_sample, x_row, x_pixel};
  p.residual = pointer(residual);
  p.residual_strides = {residual_sample, residual_row, residual_pixel};
  p.sum_out = pointer(sum_out);
  p.sum_strides = {sum_sample, sum_row, sum_pixel};
  p.y = pointer(y);
  p.y_strides = {y_sample, y_row, y_pixel};
  p.dtype = static_cast<DType>(dtype);
  p.shape = {samples, channels, groups, rows, cols, channels_last};
  p.affine =
      group_norm_affine(weight, bias, emb, emb_stride, scale, scale_stride, shift, shift_stride);
  p.eps = eps;
  p.silu = silu;
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.scratch = pointer<float>(scratch);
  p.chunk = chunk;
  p.chunks = chunks;
  return p;
}

// Of both kernels of the gradient; each has null for what it does not touch.
inline GroupNormSiluBwdParams group_norm_silu_bwd_params(
    uintptr_t s, int64_t s_sample, int64_t s_row, int64_t s_pixel, uintptr_t dy, uintptr_t dsum,
    uintptr_t dx, int dtype, int64_t samples, int64_t channels, int64_t groups, int64_t rows,
    int64_t cols, bool channels_last, uintptr_t weight, uintptr_t bias, uintptr_t emb,
    int64_t emb_stride, uintptr_t scale, int64_t scale_stride, uintptr_t shift,
    int64_t shift_stride, bool silu, uintptr_t mean, uintptr_t rstd, uintptr_t sums,
    uintptr_t group_means, uintptr_t scratch, int64_t chunk, int64_t chunks) {
  GroupNormSiluBwdParams p{};
  p.s = pointer(s);
  p.s_strides = {s_sample, s_row, s_pixel};
  p.dy = pointer(dy);
  p.dsum = pointer(dsum);
  p.dx = pointer(dx);
  p.dtype = static_cast<DType>(dtype);
  p.shape = {samples, channels, groups, rows, cols, channels_last};
  p.affine =
      group_norm_affine(weight, bias, emb, emb_stride, scale, scale_stride, shift, shift_stride);
  p.silu = silu;
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.sums = pointer<float>(sums);
  p.group_means = pointer<float>(group_means);
  p.scratch = pointer<float>(scratch);
  p.chunk = chunk;
  p.chunks = chunks;
  return p;
}

inline Conv2dParams conv2d_params(uintptr_t x, int64_t x_sample, int64_t x_row, int64_t x_pixel,
                                  uintptr_t residual, int64_t residual_sample, int64_t residual_row,
                                  int64_t residual_pixel, uintptr_t y, int64_t y_sample,
                                  int64_t y_row, int64_t y_pixel, uintptr_t weights, uintptr_t bias,
                                  int64_t bias_stride, int64_t samples, int64_t rows, int64_t cols,
                                  int64_t c_in, int64_t c_out, int kernel, int stride, int phases) {
  Conv2dParams p{};
  p.x = pointer<float>(x);
  p.x_strides = {x_sample, x_row, x_pixel};
  p.residual = pointer<float>(residual);
  p.residual_strides = {residual_sample, residual_row, residual_pixel};
  p.y = pointer<float>(y);
  p.y_strides = {y_sample, y_row, y_pixel};
  p.weights = pointer<float>(weights);
  p.bias = pointer<float>(bias);
  p.bias_stride = bias_stride;
  p.samples = samples;
  p.rows = rows;
  p.cols = cols;
  p.c_in = c_in;
  p.c_out = c_out;
  p.kernel = kernel;
  p.stride = stride;
  p.phases = phases;
  return p;
}

inline AttentionParams attention_params(uintptr_t qkv, int64_t qkv_sample, int64_t qkv_pixel,
                                        uintptr_t y, int64_t y_sample, int64_t y_pixel,
                                        int64_t samples, int64_t pixels, int64_t heads,
                                        int64_t depth) {
  AttentionParams p{};
  p.qkv = pointer<float>(qkv);
  p.qkv_strides = {qkv_sample, 0, qkv_pixel};
  p.y = pointer<float>(y);
  p.y_strides = {y_sample, 0, y_pixel};
  p.samples = samples;
  p.pixels = pixels;
  p.heads = heads;
  p.depth = depth;
  return p;
}

}  // namespace ddpm_fast
