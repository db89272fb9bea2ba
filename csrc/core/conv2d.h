// Convolutions of a network at inference, float32 with channels innermost, each with what follows
// it in a residual block:
//
//   y[n, p] = bias[n] + residual[n, p] + sum over taps and input channels of weights * x
//
// Strides are in elements; channels are dense. x begins at the first tap of the first pixel, so it
// lies in a buffer that has the zeros of the padding around it.
#pragma once

#include "pixel_strides.h"

namespace ddpm_fast {

// kernel x kernel taps, `stride` pixels apart, or of one pixel (kernel 1). With 4 phases it is the
// convolution of an image twice as large, which repeats each pixel of x to 2 x 2; rows and cols are
// x's, and each pixel of it gives 2 x 2 of y.
//
// Directly: phase (a, b) gives the pixels (2 row + a, 2 col + b) of y by 2 x 2 taps, which begin a
// rows and b pixels further on in x. weights are [phases, blocks, taps, c_in, block].
//
// By Winograd's F(2x2, 3x3) (Lavin & Gray 2016), of 3 x 3 taps and stride 1: 16 products for 4
// pixels in place of 36, or with 4 phases 9. weights are G g G^T as [blocks, 16 or 9, c_in, block];
// x has rows and cols rounded up to even numbers, plus 2.
struct Conv2dParams {
  const float* x;
  const float* weights;
  const float* bias;      // [c_out] for each sample, or for all with stride 0; or null
  const float* residual;  // or null
  float* y;
  PixelStrides x_strides, residual_strides, y_strides;
  int64_t bias_stride;
  int64_t samples, rows, cols;  // of y, or with phases of x
  int64_t c_in, c_out;
  int kernel, stride, phases;
};

// Softmax attention (Vaswani et al. 2017, eq. 1) over all pixels of an image, for each head apart:
// y = softmax(q k^T / sqrt(depth)) v. Each pixel of qkv has 3 heads depth channels: q, k, v.
struct AttentionParams {
  const float* qkv;
  float* y;
  PixelStrides qkv_strides, y_strides;  // `row` is not looked at: pixels are a row
  int64_t samples, pixels, heads, depth;
};

// Output channels that lie side by side in packed weights; the last block is filled with zeros.
constexpr int64_t kConvBlock = 32;

}  // namespace ddpm_fast
