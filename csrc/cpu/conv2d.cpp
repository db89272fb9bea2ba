// A convolution as a matrix product whose rows are read where they lie in the padded image.
#include <algorithm>

#include "kernels.h"
#include "matmul.h"
#include "tasks.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

constexpr int64_t kPixelsATask = 192;  // their inputs stay in L2 while the weights stream past

// The pixels [begin, end) of one phase, counted over samples, by one of its blocks of channels.
struct Task {
  int64_t column, begin, end;  // column: phase * blocks + block
};

struct Pixel {
  int64_t sample, row, col;

  Pixel(const Conv2dParams& p, int64_t index)
      : sample(index / (p.rows * p.cols)), row(index / p.cols % p.rows), col(index % p.cols) {}
  int64_t offset(const PixelStrides& s, int64_t scale, int64_t down, int64_t right) const {
    return sample * s.sample + (row * scale + down) * s.row + (col * scale + right) * s.pixel;
  }
};

void run(const Conv2dParams& p, const Task& task) {
  const int64_t taps = p.kernel * p.kernel;
  const int64_t blocks = ceil_div(p.c_out, kConvBlock);
  const int64_t phase = task.column / blocks, block = task.column % blocks;
  const float* block_weights = p.weights + task.column * taps * p.c_in * kConvBlock;
  const int64_t down = phase / 2, right = phase % 2, scale = p.phases == 1 ? 1 : 2;
  // Taps that lie side by side, as the pixels of a row do, are one longer product.
  const bool dense = p.x_strides.pixel == p.c_in;
  const int64_t depth = dense ? p.kernel * p.c_in : p.c_in;
  const int64_t per_row = dense ? 1 : p.kernel;

  for (int64_t first = task.begin; first < task.end; first += kTileRows) {
    const float* rows[kTileRows];
    float* outputs[kTileRows];
    const float* residuals[kTileRows];
    const float* biases[kTileRows];
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, task.end - first));
    for (int r = 0; r < kTileRows; ++r) {
      const Pixel pixel(p, first + std::min(r, count - 1));
      rows[r] = p.x + pixel.offset(p.x_strides, p.stride, down, right);
      outputs[r] = p.y + pixel.offset(p.y_strides, scale, down, right);
      residuals[r] = p.residual + pixel.offset(p.residual_strides, scale, down, right);
      biases[r] = p.bias + pixel.sample * p.bias_stride;
    }
    for (int64_t part = 0; part < kConvBlock; part += kTileChannels) {
      const int64_t channel = block * kConvBlock + part;
      if (channel >= p.c_out) break;
      TileSums tile{};
      const float* weights = block_weights + part;
      const bool narrow = p.c_out - channel <= kWidth;
      for (int64_t row = 0; row < p.kernel; ++row) {
        for (int64_t run = 0; run < per_row; ++run, weights += depth * kConvBlock) {
          const int64_t offset = row * p.x_strides.row + run * p.x_strides.pixel;
          if (narrow) {
            multiply<1>(rows, offset, 1, depth, weights, kConvBlock, tile);
          } else {
            multiply(rows, offset, 1, depth, weights, kConvBlock, tile);
          }
        }
      }
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t c = channel + v * kWidth;
        if (c >= p.c_out) break;
        for (int r = 0; r < count; ++r) {
          VecF sum = tile.sums[r][v];
          if (p.bias != nullptr) sum += load_some(biases[r] + c, p.c_out - c);
          if (p.residual != nullptr) sum += load_some(residuals[r] + c, p.c_out - c);
          store_some(outputs[r] + c, p.c_out - c, sum);
        }
      }
    }
  }
}

}  // namespace

void conv2d(const Conv2dParams& p, int threads) {
  const int64_t pixels = p.samples * p.rows * p.cols;
  if (pixels == 0) return;
  const int64_t columns = p.phases * ceil_div(p.c_out, kConvBlock);
  threads = worth(threads, pixels * p.phases * p.kernel * p.kernel * p.c_in * p.c_out);
  // Enough tasks for every thread, or for its caches, if those are more.
  const int64_t ranges = std::max(ceil_div(pixels, kPixelsATask), ceil_div(4 * threads, columns));
  const int64_t share = round_up(ceil_div(pixels, ranges), kTileRows);
  for_each_task(ceil_div(pixels, share) * columns, threads, [&](int64_t i) {
    const int64_t begin = i / columns * share;
    run(p, {i % columns, begin, std::min(begin + share, pixels)});
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
