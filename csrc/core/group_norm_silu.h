// Group normalisation with what a UNet does around it (Wu & He 2018; Ho et al. 2020, appendix B;
// Dhariwal & Nichol 2021's scale and shift):
//   s = x + residual, rounded to x's dtype      u = s + emb[n, c]
//   z = (u - mean) rstd weight + bias           z' = z (1 + scale) + shift
//   y = z' sigmoid(z'), or z'
// mean and rstd = 1 / sqrt(var + eps) are of u over each sample's group of channels: by two passes
// over each chunk, whose moments are combined in order (Chan et al. 1979). A chunk is a function of
// the shape alone, so that neither batch nor threads change a bit. Moves 8 bytes an element in
// float32 where a sample fits the cache, else 12.
//
// The gradient, with dz = dy silu'(z'), A = weight (1 + scale), xhat = (u - mean) rstd, D =
// elements of a group: group_norm_silu_sums adds up over each (n, c)'s pixels
//   S1 = sum dz      S2 = sum dz xhat      S3 = sum xhat
// from which Python makes, over each group's channels,
//   m1 = sum_c A S1 / D      m2 = sum_c A S2 / D
// with which group_norm_silu_bwd writes
//   dx = rstd (dz A - m1 - xhat m2) + dsum
#pragma once

#include "convert.h"
#include "pixel_strides.h"

namespace ddpm_fast {

// How activations lie: in channels_last at strides of their own, channels side by side; otherwise
// dense, [samples, channels, rows * cols].
struct GroupNormShape {
  int64_t samples, channels, groups, rows, cols;
  bool channels_last;

  DDPM_FAST_HD int64_t pixels() const { return rows * cols; }
  DDPM_FAST_HD int64_t group_channels() const { return channels / groups; }
  DDPM_FAST_HD int64_t group_elements() const { return group_channels() * pixels(); }
  // Of a pixel's first channel, in channels_last.
  DDPM_FAST_HD int64_t offset(const PixelStrides& strides, int64_t sample, int64_t pixel) const {
    return sample * strides.sample + pixel / cols * strides.row + pixel % cols * strides.pixel;
  }
};

// What a channel of a sample is multiplied by and moved by: z' = fma(s - centre, slope, offset),
// and xhat = (s - centre) rstd.
struct ChannelAffine {
  float centre, slope, offset;
};

// Each null: 1 for weight, 0 for the others. [channels]; emb, scale and shift at a stride from
// sample to sample, 0 where all share one row.
struct GroupNormAffine {
  const float *weight, *bias;
  const float *emb, *scale, *shift;
  int64_t emb_stride, scale_stride, shift_stride;

  DDPM_FAST_HD float emb_at(int64_t n, int64_t c) const {
    return emb != nullptr ? emb[n * emb_stride + c] : 0.0f;
  }
  // A = weight (1 + scale)
  DDPM_FAST_HD float slope_at(int64_t n, int64_t c) const {
    const float w = weight != nullptr ? weight[c] : 1.0f;
    return scale != nullptr ? w * (1.0f + scale[n * scale_stride + c]) : w;
  }
  DDPM_FAST_HD float offset_at(int64_t n, int64_t c) const {
    float b = bias != nullptr ? bias[c] : 0.0f;
    if (scale != nullptr) b = b * (1.0f + scale[n * scale_stride + c]);
    return shift != nullptr ? b + shift[n * shift_stride + c] : b;
  }
  DDPM_FAST_HD ChannelAffine at(int64_t n, int64_t c, float mean, float rstd) const {
    return {mean - emb_at(n, c), rstd * slope_at(n, c), offset_at(n, c)};
  }
};

struct GroupNormSiluParams {
  const void* x;
  const void* residual;                                              // or null
  void* sum_out;                                                     // s; null without residual
  void* y;                                                           // may be x itself
  DType dtype;                                                       // of these four
  PixelStrides x_strides, residual_strides, sum_strides, y_strides;  // in channels_last
  GroupNormShape shape;
  GroupNormAffine affine;
  float eps;
  bool silu;
  float* mean;  // [samples, groups], or null with rstd: nobody asks
  float* rstd;
  float* scratch;  // the chunks' moments: ddpm_fast/ops/group_norm_silu_run.py says how many floats
  int64_t chunk;   // so many pixels; on the CPU, but in channels_last, elements of a group
  int64_t chunks;  // of a sample's pixels, or of a group's elements; the last may be shorter
};

// Of group_norm_silu_sums, which writes sums, and group_norm_silu_bwd, which reads group_means.
struct GroupNormSiluBwdParams {
  const void* s;  // x + residual
  const void* dy;
  const void* dsum;  // what else comes back to s, or null
  void* dx;
  DType dtype;             // of these four
  PixelStrides s_strides;  // in channels_last; dy, dsum and dx are dense there, too
  GroupNormShape shape;
  GroupNormAffine affine;
  bool silu;
  const float* mean;  // [samples, groups]
  const float* rstd;
  float* sums;               // [3, samples, channels]: S1, S2, S3
  const float* group_means;  // [2, samples, groups]: m1, m2
  float* scratch;            // [samples, chunks, 3, channels]: each chunk's sums
  int64_t chunk;             // so many pixels in both layouts
  int64_t chunks;
};

// 1 / (1 + exp(-z)) to 2 ulp, z in [-87, inf]; the same bits wherever fma is. exp(-z) = 2^k
// exp(-g), k = round(-z / ln 2), |g| <= ln 2 / 2, by a polynomial of relative error 9e-8. The
// reciprocal starts from a guess of the exponent's bits, 5 % off, and takes a cubic and a quadratic
// step: a division would cost as much as all the rest.
template <class V>
DDPM_FAST_HD typename V::F sigmoid(typename V::F z) {
  using F = typename V::F;
  z = V::below(z, V::splat(87.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const F shifted = V::fma(z, V::splat(-0x1.715476p+0f), V::splat(0x1.8p+23f));
  const F k = shifted - V::splat(0x1.8p+23f);
  F g = V::fma(k, V::splat(0x1.62e400p-1f), z);  // ln 2 in two parts: the first product is exact
  g = V::fma(k, V::splat(0x1.7f7d1cp-20f), g);
  F e = V::splat(0x1.0fa7d8p-7f);  // -exp(-g)
  e = V::fma(e, g, V::splat(-0x1.573ad0p-5f));
  e = V::fma(e, g, V::splat(0x1.555a6ep-3f));
  e = V::fma(e, g, V::splat(-0x1.fffdc4p-2f));
  e = V::fma(e, g, V::splat(0x1.fffff6p-1f));
  e = V::fma(e, g, V::splat(-1.0f));
  e = V::from_bits(V::bits(e) + (V::bits(shifted) << 23));
  const F one = V::splat(1.0f), minus_d = e - one;
  F r = V::from_bits(-V::bits(minus_d) + 0xFEF311C7u);
  F error = V::fma(minus_d, r, one);
  r = V::fma(r, V::fma(error, error, error), r);
  error = V::fma(minus_d, r, one);
  return V::fma(r, error, r);
}

// z sigmoid(z). Below -87, where it is -1e-36, it stays what it is there; NaN passes.
template <class V>
DDPM_FAST_HD typename V::F silu(typename V::F z) {
  z = V::above(z, V::splat(-87.0f));
  return z * sigmoid<V>(z);
}

// Its derivative, sigmoid(z) (1 + z (1 - sigmoid(z))).
template <class V>
DDPM_FAST_HD typename V::F silu_derivative(typename V::F z) {
  using F = typename V::F;
  // Past 87 the difference of 1 and the sigmoid is 0, and infinity times it NaN.
  z = V::below(V::above(z, V::splat(-87.0f)), V::splat(87.0f));
  const F s = sigmoid<V>(z);
  return s * V::fma(z, V::splat(1.0f) - s, V::splat(1.0f));
}

// Chunks in their order: the mean of all elements so far and their sum of squares about it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  DDPM_FAST_HD void add(double n, double chunk_mean, double chunk_squares) {
    const double total = count + n, delta = chunk_mean - mean;
    mean += delta * (n / total);
    squares += chunk_squares + delta * delta * (count * n / total);
    count = total;
  }
};

}  // namespace ddpm_fast
