// The denoising loss of one tile: its gradient, and its share of the sum. Formula and bytes moved:
// core/denoising_loss.h.
#pragma once

#include "../core/denoising_loss.h"
#include "objective.cuh"

namespace ddpm_fast {
namespace cuda {

// The gradient's scale without a sample's weight, in two floats: what a GPU would need float64 for.
struct ScaledDenoisingLossParams : DenoisingLossParams {
  float scale, scale_rest;

  explicit ScaledDenoisingLossParams(const DenoisingLossParams& p) : DenoisingLossParams(p) {
    const double wide = 2.0 / p.shape.elements() * p.gradient_scale;
    scale = static_cast<float>(wide);
    scale_rest = static_cast<float>(wide - scale);
  }
};

// What a sample's elements share.
struct LossOfSample {
  float signal, sigma, scale;

  DDPM_FAST_HD LossOfSample(const ScaledDenoisingLossParams& p, int64_t n) {
    const int64_t t = timestep_of(p, n);
    signal = p.forward_weights[2 * t];
    sigma = p.forward_weights[2 * t + 1];
    scale = p.scale;
    if (p.weights != nullptr) {
      const float weight = p.weights[n], product = p.scale * weight;
      const float rest = ScalarLanes::fma(p.scale, weight, -product);
      scale = product + ScalarLanes::fma(p.scale_rest, weight, rest);
    }
  }
};

// kX0: x_0 is in the target.
template <class M, class Layout, bool kX0>
struct DenoisingLossTile {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = kWarp * Layout::kElements;
  static constexpr int kMinBlocks = Layout::kElements > 16 ? 3 : 5;
  static constexpr int kElements = Layout::kElements;

  static DDPM_FAST_HD Sums<1> run(const ScaledDenoisingLossParams& p, const Tiles& tiles,
                                  uint32_t n, uint32_t tile, int lane) {
    const Lane<Layout> at(tiles, n, tile, lane);
    float m[kElements], x0[kElements], z[kElements];
    Fetched<Layout> fetched;
    load_half<M>(p.model_output, p.doubled, 0, at, m);
    if constexpr (kX0) fetched.fetch(p.x0, p.x0_dtype, at);
    const Prediction prediction = kX0 ? p.prediction : Prediction::kEpsilon;
    const LossOfSample sample(p, n);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements; ++i) x0[i] = z[i] = 0.0f;
    if (prediction != Prediction::kSample) noise_of(p, at, n, tile, lane, z);
    if constexpr (kX0) fetched.unit(p.x0_dtype, x0);

    LaneSum sum;
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const float r =
          residual<ScalarLanes>(prediction, sample.signal, sample.sigma, m[i], x0[i], z[i]);
      sum.add_square(i, at.holds(i / Layout::kVector) ? r : 0.0f);
      m[i] = sample.scale * r;
    }
    if (p.gradient != nullptr) {
      if (p.doubled) {
        DDPM_FAST_UNROLL
        for (int i = 0; i < kElements; ++i) z[i] = 0.0f;
        store_halves<M>(p.gradient, at, m, z);
      } else {
        at.template store<M>(p.gradient, m);
      }
    }
    return {{sum.total()}};
  }
};

// A lane takes one Philox block.
struct DenoisingLossBlock {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = 4 * kWarp;
  static constexpr int kMinBlocks = 1;

  static DDPM_FAST_HD Sums<1> run(const ScaledDenoisingLossParams& p, const Tiles& tiles,
                                  uint32_t n, uint32_t tile, int lane) {
    const int64_t block = static_cast<int64_t>(tile) * kWarp + lane, elements = tiles.elements;
    const LossOfSample sample(p, n);
    const bool noisy = p.prediction != Prediction::kSample;
    Block at(p.shape, block);
    float z[4] = {};
    if (noisy && p.noise == nullptr) draw_block(noise_key(p, n), static_cast<uint32_t>(block), z);
    LaneSum sum;
    DDPM_FAST_UNROLL
    for (int j = 0; j < 4; ++j, at.next()) {
      if (j >= at.count) continue;
      const int64_t i = n * elements + at.offset();
      const int64_t i_model = place_in_half(at, p.doubled, 0, n, elements);
      if (noisy && p.noise != nullptr) z[j] = value_at(p.noise, p.noise_dtype, i);
      const float m = value_at(p.model_output, p.model_dtype, i_model);
      const float x0 = p.prediction == Prediction::kEpsilon ? 0.0f : unit_at(p.x0, p.x0_dtype, i);
      const float r = residual<ScalarLanes>(p.prediction, sample.signal, sample.sigma, m, x0, z[j]);
      sum.add_square(j, r);
      if (p.gradient == nullptr) continue;
      put(p.gradient, p.model_dtype, i_model, sample.scale * r);
      if (!p.doubled) continue;
      put(p.gradient, p.model_dtype, place_in_half(at, true, 1, n, elements), 0.0f);
    }
    return {{sum.total()}};
  }
};

// What a sample's sum comes to.
struct DenoisingLossFinish {
  static constexpr int kSums = 1;

  static DDPM_FAST_HD void run(const ScaledDenoisingLossParams& p, int64_t n,
                               const Sums<kSums, TwoFloats>& sums) {
    p.loss[n] = p.weight(n) * sums.of[0].over(p.shape.elements()).rounded();
  }
};

// visit(body) for the body that takes this problem.
template <class Visit>
void visit_denoising_loss(const DenoisingLossParams& p, const Visit& visit) {
  const bool found = visit_objective(p, [&](auto m, auto layout) {
    using M = decltype(m);
    using Layout = decltype(layout);
    if (p.prediction == Prediction::kEpsilon) {
      visit(DenoisingLossTile<M, Layout, false>{});
    } else {
      visit(DenoisingLossTile<M, Layout, true>{});
    }
  });
  if (!found) visit(DenoisingLossBlock{});
}

}  // namespace cuda
}  // namespace ddpm_fast
