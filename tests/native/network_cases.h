// The same of a network's ops: group norms, convolutions and attention, on images whose pixels and
// rows lie apart, which stay as they are in between.
#pragma once

#include "diffusion_cases.h"

namespace sanitize {

using ddpm_fast::kConvBlock;
using ddpm_fast::PixelStrides;

// [samples, rows, cols, channels], with what a wider image has between two pixels.
struct Image {
  int64_t samples, rows, cols, channels;
  PixelStrides strides;

  Image(int64_t samples, int64_t rows, int64_t cols, int64_t channels)
      : samples(samples), rows(rows), cols(cols), channels(channels) {
    const int64_t pixel = channels + (chance() ? pick(5) : 0);
    const int64_t row = cols * pixel + (chance() ? pick(9) : 0);
    strides = {rows * row + (chance() ? pick(9) : 0), row, pixel};
  }
  // Up to its last channel and no further.
  int64_t count() const {
    if (samples * rows * cols * channels == 0) return 0;
    return (samples - 1) * strides.sample + (rows - 1) * strides.row + (cols - 1) * strides.pixel +
           channels;
  }
  // All of the image is written, and nothing between.
  void check(const Memory& memory, const char* op) const {
    std::vector<bool> ours(static_cast<size_t>(memory.count()));
    for (int64_t i = 0; i < samples * rows * cols * channels; ++i) {
      const int64_t c = i % channels, pixel = i / channels, col = pixel % cols;
      const int64_t row = pixel / cols % rows, sample = pixel / cols / rows;
      ours[static_cast<size_t>(sample * strides.sample + row * strides.row + col * strides.pixel +
                               c)] = true;
    }
    for (int64_t i = 0; i < memory.count(); ++i) {
      expect(memory.unwritten(i) != ours[static_cast<size_t>(i)], op);
    }
  }
};

template <class Call>
void compare_images(const char* op, const Image& image, DType dtype, const Call& call) {
  const Memory alone(image.count(), dtype), shared(image.count(), dtype);
  call(1, alone);
  call(2 + static_cast<int>(pick(3)), shared);
  expect(alone.same(shared), op);
  image.check(alone, op);
}

// Sizes as ddpm_fast/ops/group_norm_silu_run.py says.
inline int64_t chunks_of(int64_t length, int64_t chunk) { return (length + chunk - 1) / chunk; }

struct Normed {
  int64_t groups = 1 + pick(4), channels = groups * (1 + pick(9));
  Image x{1 + pick(3), 1 + pick(12), 1 + pick(12), pick(9) == 0 ? channels *= 40 : channels};
  bool channels_last = chance(), silu = chance();
  ddpm_fast::GroupNormShape shape{x.samples, channels, groups, x.rows, x.cols, channels_last};
  DType dtype = a_float();
  Memory weight = perhaps(chance(), channels, DType::kFloat32);
  Memory bias = perhaps(chance(), channels, DType::kFloat32);
  int64_t stride = chance() ? 0 : channels + pick(3);
  int64_t row = (x.samples - 1) * stride + channels;
  Memory emb = perhaps(chance(), row, DType::kFloat32);
  Memory scale = perhaps(chance(), row, DType::kFloat32);
  Memory shift = perhaps(chance(), row, DType::kFloat32);
  ddpm_fast::GroupNormAffine affine{
      weight.as<float>(), bias.as<float>(), emb.as<float>(), scale.as<float>(),
      shift.as<float>(),  stride,           stride,          stride};

  Normed() {
    if (!channels_last) x.strides = {channels * x.rows * x.cols, channels * x.cols, channels};
  }
  int64_t pixels() const { return x.rows * x.cols; }
};

inline void group_norm_silu_case() {
  const Normed n;
  const Memory x = Memory::of_values(n.x.count(), n.dtype);
  const Memory residual = perhaps(chance(), n.x.count(), n.dtype);
  const bool told = chance(), in_place = chance();
  ddpm_fast::GroupNormSiluParams p{};
  p.residual = residual.get();
  p.dtype = n.dtype;
  p.x_strides = p.residual_strides = p.sum_strides = p.y_strides = n.x.strides;
  p.shape = n.shape;
  p.affine = n.affine;
  p.eps = 1e-5f;
  p.silu = n.silu;
  p.chunk = 4096;
  int64_t length = n.channels / n.groups * n.pixels(), each = n.groups;
  if (n.channels_last) {
    p.chunk = std::min<int64_t>(std::max<int64_t>(4096 / n.channels, 1), 64);
    length = n.pixels(), each = n.channels;
  }
  if (pick(3) == 0) p.chunk = 1 + pick(p.chunk);
  p.chunks = chunks_of(length, p.chunk);
  const Image statistics(1, 1, n.x.samples, n.groups);
  std::vector<Memory> found;
  compare_images("group_norm_silu", n.x, n.dtype, [&](int threads, const Memory& y) {
    const Memory scratch = unwritten_floats(n.x.samples * p.chunks * 2 * each);
    const Memory sum(residual.get() != nullptr ? n.x.count() : 0, n.dtype);
    const int64_t told_of = told ? n.x.samples * n.groups : 0;
    Memory mean = unwritten_floats(told_of), rstd = unwritten_floats(told_of);
    p.x = x.get();
    if (in_place && n.x.count() == n.x.samples * n.pixels() * n.channels) {
      std::memcpy(y.get(), x.get(), static_cast<size_t>(x.bytes()));
      p.x = y.get();
    }
    p.y = y.get();
    p.sum_out = residual.get() != nullptr ? sum.get() : nullptr;
    p.mean = told ? mean.as<float>() : nullptr;
    p.rstd = told ? rstd.as<float>() : nullptr;
    p.scratch = scratch.as<float>();
    isa::group_norm_silu(p, threads);
    if (residual.get() != nullptr) n.x.check(sum, "group_norm_silu: the sum");
    found.push_back(std::move(mean));
    found.push_back(std::move(rstd));
  });
  expect(found[0].same(found[2]) && found[1].same(found[3]), "group_norm_silu: statistics");
}

inline void group_norm_silu_backward_case() {
  const Normed n;
  const int64_t dense = n.x.samples * n.pixels() * n.channels;
  const Memory s = Memory::of_values(n.x.count(), n.dtype);
  const Memory dy = Memory::of_values(dense, n.dtype);
  const Memory dsum = perhaps(chance(), dense, n.dtype);
  const Memory mean = of_floats(n.x.samples * n.groups), rstd = of_floats(n.x.samples * n.groups);
  const Memory means = of_floats(2 * n.x.samples * n.groups);
  ddpm_fast::GroupNormSiluBwdParams p{};
  p.s = s.get();
  p.dy = dy.get();
  p.dtype = n.dtype;
  p.s_strides = n.x.strides;
  p.shape = n.shape;
  p.affine = n.affine;
  p.silu = n.silu;
  p.mean = mean.as<float>();
  p.rstd = rstd.as<float>();
  p.chunk = 1 + pick(n.channels_last ? 32 : 200);
  p.chunks = chunks_of(n.pixels(), p.chunk);
  compare(
      "group_norm_silu_sums",
      [&] { return outputs_of(unwritten_floats(3 * n.x.samples * n.channels)); },
      [&](int threads, const Outputs& out) {
        const Memory scratch = unwritten_floats(n.x.samples * p.chunks * 3 * n.channels);
        p.scratch = scratch.as<float>();
        p.sums = out[0].as<float>();
        isa::group_norm_silu_sums(p, threads);
      });
  p.sums = p.scratch = nullptr;
  p.dsum = dsum.get();
  p.group_means = means.as<float>();
  compare(
      "group_norm_silu_bwd", [&] { return outputs_of(Memory(dense, n.dtype)); },
      [&](int threads, const Outputs& out) {
        p.dx = out[0].get();
        isa::group_norm_silu_bwd(p, threads);
      });
}

inline void convolution_case() {
  ddpm_fast::Conv2dParams p{};
  const bool winograd = chance();
  p.phases = chance() ? 4 : 1;
  p.kernel = winograd ? 3 : p.phases == 4 ? 2 : one_of({1, 3});
  p.stride = winograd || p.phases == 4 ? 1 : 1 + static_cast<int>(pick(2));
  p.samples = pick(4);
  p.rows = 1 + pick(9);
  p.cols = 1 + pick(9);
  p.c_in = 1 + pick(40);
  p.c_out = 1 + pick(70);
  if (pick(8) == 0) p.samples = 2, p.rows = p.cols = 16, p.c_in = 40, p.c_out = 80;
  const auto side = [&](int64_t pixels) {
    if (winograd) return pixels + (p.phases == 1 ? pixels % 2 : 0) + 2;
    return (pixels - 1) * p.stride + p.kernel + (p.phases == 4 ? 1 : 0);
  };
  const Image x(p.samples, side(p.rows), side(p.cols), p.c_in);
  const int64_t scale = p.phases == 4 ? 2 : 1;
  const Image y(p.samples, p.rows * scale, p.cols * scale, p.c_out);
  const int64_t places = winograd ? (p.phases == 4 ? 9 : 16) : p.phases * p.kernel * p.kernel;
  const int64_t blocks = chunks_of(p.c_out, kConvBlock);
  const Memory pixels = of_floats(x.count());
  const Memory weights = of_floats(blocks * places * p.c_in * kConvBlock);
  const bool of_each = chance();
  const Memory bias = perhaps(chance(), of_each ? p.samples * p.c_out : p.c_out, DType::kFloat32);
  const Memory residual = perhaps(chance(), y.count(), DType::kFloat32);
  p.x = pixels.as<float>();
  p.x_strides = x.strides;
  p.weights = weights.as<float>();
  p.bias = bias.as<float>();
  p.bias_stride = bias.get() != nullptr && of_each ? p.c_out : 0;
  p.residual = residual.as<float>();
  if (residual.get() != nullptr) p.residual_strides = y.strides;
  p.y_strides = y.strides;
  compare_images("conv2d", y, DType::kFloat32, [&](int threads, const Memory& out) {
    p.y = out.as<float>();
    winograd ? isa::winograd_conv2d(p, threads) : isa::conv2d(p, threads);
  });
}

inline void attention_case() {
  ddpm_fast::AttentionParams p{};
  p.samples = pick(3);
  p.pixels = 1 + pick(90);
  p.heads = 1 + pick(3);
  p.depth = 1 + pick(70);
  const int64_t channels = p.heads * p.depth;
  const Image qkv(p.samples, 1, p.pixels, 3 * channels), y(p.samples, 1, p.pixels, channels);
  const Memory of_qkv = of_floats(qkv.count());
  p.qkv = of_qkv.as<float>();
  p.qkv_strides = qkv.strides;
  p.y_strides = y.strides;
  compare_images("attention", y, DType::kFloat32, [&](int threads, const Memory& out) {
    p.y = out.as<float>();
    isa::attention(p, threads);
  });
}

}  // namespace sanitize
