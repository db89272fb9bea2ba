// The terms of the bound of one tile: their gradient, and its shares of the sums. Formula and bytes
// moved: core/vlb_terms.h.
#pragma once

#include "../core/decoder.h"
#include "../core/vlb_terms.h"
#include "objective.cuh"

namespace ddpm_fast {
namespace cuda {

// The scales of the gradient that a launch's samples share: a GPU's division takes a subroutine.
struct ScaledVlbTermsParams : VlbTermsParams {
  float bits_per_nat, regression;

  explicit ScaledVlbTermsParams(const VlbTermsParams& p)
      : VlbTermsParams(p),
        bits_per_nat(kBitsPerNat / p.shape.elements()),
        regression(2.0f / p.shape.elements()) {}
};

constexpr float kBitsPerNatRest = 0x1.4ae0bep-26f;  // of log2(e) in two floats

enum VlbSum { kSimpleSum, kVlbSum, kSquaredErrorSum, kVlbSums };

struct VlbLaneSums {
  LaneSum of[kVlbSums];

  DDPM_FAST_HD Sums<kVlbSums> total() const {
    return {{of[kSimpleSum].total(), of[kVlbSum].total(), of[kSquaredErrorSum].total()}};
  }
};

// What a sample's elements share.
struct VlbOfSample {
  VlbRow row;
  bool first;        // t = 0: the decoder's term
  float by_m;        // x0_hat's derivative by m, times the gradient's scale
  float by_v;        // the ratio's by v, likewise
  float simple;      // the regression's scale
  float fixed_by_m;  // the gradient of an error of 1, where the variance is fixed

  DDPM_FAST_HD VlbOfSample(const ScaledVlbTermsParams& p, int64_t n) {
    const int64_t t = timestep_of(p, n);
    const float per_nat = p.bits_per_nat * p.vlb_weight(n) * p.gradient_scale;
    row = p.rows[t];
    first = t == 0;
    by_m = row.r * row.c_m * per_nat;
    by_v = log_ratio_by_v(row, p.variance) * per_nat;
    simple = p.regression * p.simple_weight(n) * p.gradient_scale;
    fixed_by_m = KlTerm<ScalarLanes>(row, row.ratio_min, 1.0f).by_x0_hat * by_m;
  }
};

// One element: x0_hat, and whether the clip leaves it as it is. A NaN is not held: it reaches the
// gradient.
struct PredictedX0 {
  float x0_hat;
  bool moves;

  DDPM_FAST_HD PredictedX0(const VlbTermsParams& p, const VlbRow& row, float x0, float z, float m) {
    const float x_t = q_sample<ScalarLanes>(row.signal, row.sigma, x0, z);
    const float unclipped = row.r * ScalarLanes::fma(row.c_m, m, row.c_x * x_t);
    x0_hat = clip<ScalarLanes>(unclipped, p.lo, p.hi);
    moves = !(unclipped < p.lo || unclipped > p.hi);
  }
};

// The i-th of a lane's elements at t > 0: its gradient takes the place of m and v.
template <bool kLearned, bool kHybrid>
DDPM_FAST_HD void kl_element(const VlbTermsParams& p, const VlbOfSample& sample, int i, bool exists,
                             float x0, float z, float& m, float& v, VlbLaneSums& sums) {
  const PredictedX0 predicted(p, sample.row, x0, z, m);
  const float error = x0 - predicted.x0_hat;
  float by_m = sample.fixed_by_m * error;
  if constexpr (kLearned) {
    const float ratio = log_ratio<ScalarLanes>(sample.row, p.variance, v);
    const KlTerm<ScalarLanes> term(sample.row, ratio, error);
    by_m = term.by_x0_hat * sample.by_m;
    v = term.by_ratio * sample.by_v;
    sums.of[kVlbSum].add(i, exists ? term.nats : 0.0f);
  }
  by_m = predicted.moves ? by_m : 0.0f;
  if constexpr (kHybrid) {
    const float r =
        residual<ScalarLanes>(p.prediction, sample.row.signal, sample.row.sigma, m, x0, z);
    by_m = sample.simple * r;
    sums.of[kSimpleSum].add_square(i, exists ? r : 0.0f);
  }
  sums.of[kSquaredErrorSum].add_square(i, exists ? error : 0.0f);
  m = by_m;
}

// A Philox block of elements at t = 0, one after the other: the samples there are few, and what
// this takes must not be kept ready for the others.
DDPM_FAST_HD void decoder_block(const ScaledVlbTermsParams& p, const VlbOfSample& sample, int64_t n,
                                int64_t elements, uint32_t block, Block at, VlbLaneSums& sums) {
  const bool learned = is_learned(p.variance);
  float z[4] = {};
  if (p.noise == nullptr) draw_block(noise_key(p, n), block, z);
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int j = 0; j < at.count; ++j, at.next()) {
    const int64_t i = n * elements + at.offset();
    const int64_t i_m = place_in_half(at, learned, 0, n, elements);
    const int64_t i_v = place_in_half(at, true, 1, n, elements);
    const float x0 = unit_at(p.x0, p.x0_dtype, i);
    const float eps = p.noise != nullptr ? value_at(p.noise, p.noise_dtype, i) : z[0];
    z[0] = z[1], z[1] = z[2], z[2] = z[3];
    const float m = value_at(p.model_output, p.model_dtype, i_m);
    const float v = learned ? value_at(p.model_output, p.model_dtype, i_v) : 0.0f;
    const PredictedX0 predicted(p, sample.row, x0, eps, m);
    const float ratio = log_ratio<ScalarLanes>(sample.row, p.variance, v);
    const DecoderTerm<float> term(x0, predicted.x0_hat, 0.5f * (sample.row.log_variance - ratio),
                                  p.cdf);
    sums.of[kVlbSum].add(0, term.nats);
    sums.of[kSquaredErrorSum].add_square(0, x0 - predicted.x0_hat);
    float by_m = predicted.moves ? term.by_mean * sample.by_m : 0.0f;
    if (p.hybrid) {
      const float r =
          residual<ScalarLanes>(p.prediction, sample.row.signal, sample.row.sigma, m, x0, eps);
      by_m = sample.simple * r;
      sums.of[kSimpleSum].add_square(0, r);
    }
    if (p.gradient == nullptr) continue;
    put(p.gradient, p.model_dtype, i_m, by_m);
    if (learned) put(p.gradient, p.model_dtype, i_v, -0.5f * term.by_log_std * sample.by_v);
  }
}

template <class M, class Layout, bool kLearned, bool kHybrid>
struct VlbTermsTile {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = kWarp * Layout::kElements;
  static constexpr int kMinBlocks = Layout::kElements > 16 ? 3 : 4;
  static constexpr int kElements = Layout::kElements;

  static DDPM_FAST_HD Sums<kVlbSums> run(const ScaledVlbTermsParams& p, const Tiles& tiles,
                                         uint32_t n, uint32_t tile, int lane) {
    const Lane<Layout> at(tiles, n, tile, lane);
    float m[kElements], v[kElements], x0[kElements], z[kElements];
    if constexpr (kLearned) {
      load_halves<M>(p.model_output, at, m, v);
    } else {
      at.template load<M>(p.model_output, m);
    }
    Fetched<Layout> fetched;
    fetched.fetch(p.x0, p.x0_dtype, at);
    const VlbOfSample sample(p, n);
    VlbLaneSums sums;
    if (sample.first) {
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
      for (int i = 0; i < kElements / 4; ++i) {
        const Block block = Layout::block(p.shape, tile, lane, i);
        const int64_t first = block.channel * block.pixels + block.pixel;  // in noise order
        decoder_block(p, sample, n, at.elements, static_cast<uint32_t>(first / 4), block, sums);
      }
      return sums.total();
    }
    noise_of(p, at, n, tile, lane, z);
    fetched.unit(p.x0_dtype, x0);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements; ++i) {
      kl_element<kLearned, kHybrid>(p, sample, i, at.holds(i / Layout::kVector), x0[i], z[i], m[i],
                                    v[i], sums);
    }
    if (p.gradient != nullptr) {
      if constexpr (kLearned) {
        store_halves<M>(p.gradient, at, m, v);
      } else {
        at.template store<M>(p.gradient, m);
      }
    }
    return sums.total();
  }
};

// A lane takes one Philox block.
struct VlbTermsBlock {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = 4 * kWarp;
  static constexpr int kMinBlocks = 1;

  static DDPM_FAST_HD Sums<kVlbSums> run(const ScaledVlbTermsParams& p, const Tiles& tiles,
                                         uint32_t n, uint32_t tile, int lane) {
    const uint32_t block = tile * kWarp + lane;
    const Block at(p.shape, static_cast<int64_t>(tile) * kWarp + lane);
    const VlbOfSample sample(p, n);
    VlbLaneSums sums;
    if (sample.first) {
      decoder_block(p, sample, n, tiles.elements, block, at, sums);
    } else if (!is_learned(p.variance)) {
      p.hybrid ? kl_block<false, true>(p, sample, n, tiles.elements, block, at, sums)
               : kl_block<false, false>(p, sample, n, tiles.elements, block, at, sums);
    } else {
      p.hybrid ? kl_block<true, true>(p, sample, n, tiles.elements, block, at, sums)
               : kl_block<true, false>(p, sample, n, tiles.elements, block, at, sums);
    }
    return sums.total();
  }

 private:
  template <bool kLearned, bool kHybrid>
  static DDPM_FAST_HD void kl_block(const ScaledVlbTermsParams& p, const VlbOfSample& sample,
                                    int64_t n, int64_t elements, uint32_t block, Block at,
                                    VlbLaneSums& sums) {
    float z[4] = {};
    if (p.noise == nullptr) draw_block(noise_key(p, n), block, z);
    DDPM_FAST_UNROLL
    for (int j = 0; j < 4; ++j, at.next()) {
      if (j >= at.count) continue;
      const int64_t i = n * elements + at.offset();
      const int64_t i_m = place_in_half(at, kLearned, 0, n, elements);
      const int64_t i_v = place_in_half(at, true, 1, n, elements);
      if (p.noise != nullptr) z[j] = value_at(p.noise, p.noise_dtype, i);
      float m = value_at(p.model_output, p.model_dtype, i_m);
      float v = kLearned ? value_at(p.model_output, p.model_dtype, i_v) : 0.0f;
      kl_element<kLearned, kHybrid>(p, sample, j, true, unit_at(p.x0, p.x0_dtype, i), z[j], m, v,
                                    sums);
      if (p.gradient == nullptr) continue;
      put(p.gradient, p.model_dtype, i_m, m);
      if (kLearned) put(p.gradient, p.model_dtype, i_v, v);
    }
  }
};

// What a sample's sums come to.
struct VlbTermsFinish {
  static constexpr int kSums = kVlbSums;

  static DDPM_FAST_HD void run(const ScaledVlbTermsParams& p, int64_t n,
                               const Sums<kSums, TwoFloats>& sums) {
    const int64_t elements = p.shape.elements();
    const float simple = sums.of[kSimpleSum].over(elements).rounded();
    const TwoFloats squared_error = sums.of[kSquaredErrorSum].over(elements);
    TwoFloats nats = sums.of[kVlbSum].over(elements);
    const int64_t t = timestep_of(p, n);
    if (!is_learned(p.variance) && t != 0) {  // then all elements have one variance
      const VlbRow row = p.rows[t];
      const KlTerm<ScalarLanes> without(row, row.ratio_min, 0.0f);
      const KlTerm<ScalarLanes> with(row, row.ratio_min, 1.0f);
      nats =
          TwoFloats{without.nats, 0.0f} + TwoFloats{-0.5f * with.by_x0_hat, 0.0f} * squared_error;
    }
    const float vlb = (nats * TwoFloats{kBitsPerNat, kBitsPerNatRest}).rounded();
    p.parts[n] = simple;
    p.parts[p.shape.samples + n] = vlb;
    p.parts[2 * p.shape.samples + n] = squared_error.rounded();
    p.total[n] = p.vlb_weight(n) * vlb + (p.hybrid ? p.simple_weight(n) * simple : 0.0f);
  }
};

// visit(body) for the body that takes this problem.
template <class Visit>
void visit_vlb_terms(const VlbTermsParams& p, const Visit& visit) {
  const bool learned = is_learned(p.variance);
  const bool has_tile = learned || !p.hybrid;
  const bool found = has_tile && visit_objective(p, [&](auto m, auto layout) {
                       using M = decltype(m);
                       using Layout = decltype(layout);
                       if (!learned) return visit(VlbTermsTile<M, Layout, false, false>{});
                       if (!p.hybrid) return visit(VlbTermsTile<M, Layout, true, false>{});
                       visit(VlbTermsTile<M, Layout, true, true>{});
                     });
  if (!found) visit(VlbTermsBlock{});
}

}  // namespace cuda
}  // namespace ddpm_fast
