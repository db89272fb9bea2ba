// The forward process of one tile. Formula and bytes moved: core/add_noise.h.
#pragma once

#include "../core/add_noise.h"
#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

struct Weights {
  float signal, sigma;

  DDPM_FAST_HD Weights(const AddNoiseParams& p, int64_t n) {
    const int64_t t = timestep_of(p, n);
    signal = p.weights[2 * t];
    sigma = p.weights[2 * t + 1];
  }

  DDPM_FAST_HD float noised(bool pixels, float x0, float z) const {
    if (pixels) x0 = unit_from_pixel<ScalarLanes>(x0);
    return q_sample<ScalarLanes>(signal, sigma, x0, z);
  }
};

DDPM_FAST_HD NoiseKey key_of(const AddNoiseParams& p, int64_t n) {
  return p.source.key(n, p.draw.draw(n));
}

template <class X0, class Out, class Layout>
struct AddNoiseTile {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = kWarp * Layout::kElements;
  static constexpr int kMinBlocks = Layout::kElements > 16 ? 4 : 6;

  static DDPM_FAST_HD void run(const AddNoiseParams& p, const Tiles& tiles, uint32_t n,
                               uint32_t tile, int lane) {
    const Lane<Layout> at(tiles, n, tile, lane);
    float x0[Layout::kElements], z[Layout::kElements];
    at.template load<X0>(p.x0, x0);
    const Weights weights(p, n);
    if (p.noise != nullptr) {
      at.load(p.noise, p.noise_dtype, z);
    } else {
      Layout::draw(key_of(p, n), p.shape, tile, lane, z);
    }
    DDPM_FAST_UNROLL
    for (int i = 0; i < Layout::kElements; ++i) {
      x0[i] = weights.noised(X0::kDType == DType::kUInt8, x0[i], z[i]);
    }
    at.template store<Out>(p.out, x0);
  }
};

struct AddNoiseBlock {
  static constexpr int kLanes = 1;
  static constexpr int kTile = 4;
  static constexpr int kMinBlocks = 1;

  static DDPM_FAST_HD void run(const AddNoiseParams& p, const Tiles& tiles, int64_t n,
                               int64_t block) {
    const Weights weights(p, n);
    float z[4];
    if (p.noise == nullptr) draw_block(key_of(p, n), static_cast<uint32_t>(block), z);
    Block at(p.shape, block);
    DDPM_FAST_UNROLL
    for (int j = 0; j < 4; ++j, at.next()) {
      if (j >= at.count) continue;
      const int64_t i = n * tiles.elements + at.offset();
      if (p.noise != nullptr) z[j] = value_at(p.noise, p.noise_dtype, i);
      const float x0 = value_at(p.x0, p.x0_dtype, i);
      put(p.out, p.out_dtype, i, weights.noised(p.x0_dtype == DType::kUInt8, x0, z[j]));
    }
  }
};

// visit(body) for the body that takes this problem.
template <class Visit>
void visit_add_noise(const AddNoiseParams& p, const Visit& visit) {
  const bool whole = is_regular(p.shape) && aligned(p.x0) && aligned(p.out) && aligned(p.noise);
  const auto of_types = [&](auto x0, auto out) {
    using X0 = decltype(x0);
    using Out = decltype(out);
    if (!whole || p.x0_dtype != X0::kDType || p.out_dtype != Out::kDType) return false;
    return visit_layout<vector_of<Out>()>(
        p.shape, [&](auto layout) { visit(AddNoiseTile<X0, Out, decltype(layout)>{}); });
  };
  if (!(of_types(Float32{}, Float32{}) || of_types(BFloat16{}, BFloat16{}) ||
        of_types(Float16{}, Float16{}) || of_types(Pixel{}, Float32{}) ||
        of_types(Pixel{}, BFloat16{}) || of_types(Pixel{}, Float16{}))) {
    visit(AddNoiseBlock{});
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
