// The reverse step of one tile. Formula and bytes moved: core/reverse_step.h.
#pragma once

#include "../core/reverse_step.h"
#include "halves.cuh"

namespace ddpm_fast {
namespace cuda {

// What a tile's elements share. A row index that lies on the device may be out of range: it is
// brought into the table, and the word for the first row that went wrong gets -1.
struct StepOfSample {
  StepRow row;
  NoiseKey key;
  int32_t reported;  // where a NaN turns up

  DDPM_FAST_HD StepOfSample(const ReverseStepParams& p, int64_t n) {
    uint64_t index = p.step;
    bool in_range = true;
    if (p.steps != nullptr) {
      index = static_cast<uint64_t>(p.steps[n * p.steps_stride]);
      in_range = index < static_cast<uint64_t>(p.num_rows);
      if (!in_range) index = p.num_rows - 1;
    }
    row = p.rows[index];
    key = p.source.key(n, draw_of(kStreamReverseStep, p.timesteps[index]));
    reported = in_range ? static_cast<int32_t>(index) : -1;
  }

  DDPM_FAST_HD void report(int32_t* nan_step, bool nan) const {
    if (nan_step == nullptr || !(nan || reported < 0)) return;
#if defined(__CUDA_ARCH__)
    atomicMin(nan_step, reported);
#else
    if (reported < *nan_step) *nan_step = reported;
#endif
  }
};

// sigma * z, and +0 where sigma is 0 whatever the sign of z: the draws need no branch around them.
DDPM_FAST_HD float noise_term(float sigma, float z) { return ScalarLanes::fma(sigma, z, 0.0f); }

// What a body can do beyond the plain step (which has a second output in M's type, too). What it
// can do it looks at once a tile; what it cannot costs neither instructions nor registers.
constexpr unsigned kGuidance = 1;
constexpr unsigned kLearnedVariance = 2;
constexpr unsigned kTheRest = 4;  // noise or x0 given, x0_hat put out, any second output
constexpr unsigned kEverything = kGuidance | kLearnedVariance | kTheRest;

// X and M: the types of the state and of the model's output.
template <class X, class M, class Layout, unsigned kCan>
struct ReverseStepTile {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = kWarp * Layout::kElements;
  // As many blocks of a multiprocessor as leave registers enough, by the compiler's report.
  static constexpr int kMinBlocks = Layout::kElements > 16 ? 2 : kCan == 0 ? 5 : 4;
  static constexpr int kElements = Layout::kElements;
  using Values = float[kElements];

  static DDPM_FAST_HD void run(const ReverseStepParams& p, const Tiles& tiles, uint32_t n,
                               uint32_t tile, int lane) {
    const Lane<Layout> at(tiles, n, tile, lane);
    Values x, m, x0, z;
    at.template load<X>(p.x, x);
    const bool doubled = (kCan & kLearnedVariance) != 0 && p.variance != Variance::kNone;
    load_half<M>(p.model_output, doubled, 0, at, m);

    const StepOfSample step(p, n);
    if constexpr ((kCan & kGuidance) != 0) {
      if (p.model_output_uncond != nullptr) {
        const float scale = p.guidance_scale_of(n);
        Values u;
        load_half<M>(p.model_output_uncond, doubled, 0, at, u);
        DDPM_FAST_UNROLL
        for (int i = 0; i < kElements; ++i) m[i] = guided<ScalarLanes>(m[i], u[i], scale);
      }
    }
    constexpr bool kOwnSigma = (kCan & kLearnedVariance) != 0;  // one an element
    float sigma[kOwnSigma ? kElements : 1];
    DDPM_FAST_UNROLL
    for (int i = 0; i < (kOwnSigma ? kElements : 1); ++i) sigma[i] = step.row.sigma;
    if constexpr (kOwnSigma) {
      if (is_learned(p.variance) && step.row.sigma != 0.0f) {
        load_half<M>(p.model_output, true, 1, at, sigma);
        DDPM_FAST_UNROLL
        for (int i = 0; i < kElements; ++i) {
          sigma[i] = learned_sigma<ScalarLanes>(step.row, p.variance, sigma[i]);
        }
      }
    }
    if ((kCan & kTheRest) != 0 && p.x0 != nullptr) {
      at.load(p.x0, p.x0_dtype, x0);
    } else {
      DDPM_FAST_UNROLL
      for (int i = 0; i < kElements; ++i) x0[i] = predict_x0<ScalarLanes>(step.row, x[i], m[i]);
    }
    if ((kCan & kTheRest) != 0 && p.noise != nullptr) {
      DDPM_FAST_UNROLL
      for (int i = 0; i < kElements; ++i) z[i] = 0.0f;
      if (step.row.sigma != 0.0f) at.load(p.noise, p.noise_dtype, z);
    } else {
      Layout::draw(step.key, p.shape, tile, lane, z);
    }

    bool nan = false;
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements; ++i) {
      x0[i] = clip<ScalarLanes>(x0[i], p.lo, p.hi);
      x[i] = step_to<ScalarLanes>(step.row, x0[i], x[i], m[i],
                                  noise_term(sigma[kOwnSigma ? i : 0], z[i]));
      nan = nan | ((x[i] != x[i]) & at.holds(i / Layout::kVector));
    }
    at.template store<X>(p.out, x);
    if constexpr ((kCan & kTheRest) != 0) {
      if (p.out_x0 != nullptr) at.template store<Float32>(p.out_x0, x0);
      if (p.out_lowp != nullptr) at.store(p.out_lowp, p.out_lowp_dtype, x);
    } else if constexpr (X::kSize > M::kSize) {
      if (p.out_lowp != nullptr) at.template store<M>(p.out_lowp, x);
    }
    step.report(p.nan_step, nan);
  }
};

struct ReverseStepBlock {
  static constexpr int kLanes = 1;
  static constexpr int kTile = 4;
  static constexpr int kMinBlocks = 1;

  static DDPM_FAST_HD void run(const ReverseStepParams& p, const Tiles& tiles, int64_t n,
                               int64_t block) {
    const StepOfSample step(p, n);
    const float scale = p.guidance_scale_of(n);
    const bool noisy = step.row.sigma != 0.0f, doubled = p.variance != Variance::kNone;
    float z[4] = {};
    if (noisy && p.noise == nullptr) draw_block(step.key, static_cast<uint32_t>(block), z);
    bool nan = false;
    Block at(p.shape, block);
    DDPM_FAST_UNROLL
    for (int j = 0; j < 4; ++j, at.next()) {
      if (j >= at.count) continue;
      const int64_t i = n * tiles.elements + at.offset();
      const int64_t i_model = doubled ? 2 * n * tiles.elements + at.offset_in_half(0) : i;
      const float x = value_at(p.x, p.x_dtype, i);
      float m = value_at(p.model_output, p.model_dtype, i_model);
      if (p.model_output_uncond != nullptr) {
        m = guided<ScalarLanes>(m, value_at(p.model_output_uncond, p.model_dtype, i_model), scale);
      }
      float sigma = step.row.sigma;
      if (noisy && is_learned(p.variance)) {
        const int64_t i_v = 2 * n * tiles.elements + at.offset_in_half(1);
        sigma = learned_sigma<ScalarLanes>(step.row, p.variance,
                                           value_at(p.model_output, p.model_dtype, i_v));
      }
      if (noisy && p.noise != nullptr) z[j] = value_at(p.noise, p.noise_dtype, i);
      const float x0 =
          p.x0 != nullptr ? value_at(p.x0, p.x0_dtype, i) : predict_x0<ScalarLanes>(step.row, x, m);
      const float clipped = clip<ScalarLanes>(x0, p.lo, p.hi);
      const float result = step_to<ScalarLanes>(step.row, clipped, x, m, noise_term(sigma, z[j]));
      nan = nan || result != result;
      put(p.out, p.x_dtype, i, result);
      if (p.out_x0 != nullptr) put(p.out_x0, DType::kFloat32, i, clipped);
      if (p.out_lowp != nullptr) put(p.out_lowp, p.out_lowp_dtype, i, result);
    }
    step.report(p.nan_step, nan);
  }
};

// visit(body) for the body that takes this problem.
template <class Visit>
void visit_reverse_step(const ReverseStepParams& p, const Visit& visit) {
  const bool whole = is_regular(p.shape) && aligned(p.x) && aligned(p.model_output) &&
                     aligned(p.model_output_uncond) && aligned(p.x0) && aligned(p.noise) &&
                     aligned(p.out) && aligned(p.out_x0) && aligned(p.out_lowp);
  const bool usual_lowp =
      p.out_lowp == nullptr || (p.x_dtype == DType::kFloat32 && p.model_dtype == p.out_lowp_dtype);
  unsigned needed = 0;
  if (p.model_output_uncond != nullptr) needed |= kGuidance;
  if (p.variance != Variance::kNone) needed |= kLearnedVariance;
  if (p.x0 != nullptr || p.noise != nullptr || p.out_x0 != nullptr || !usual_lowp) {
    needed |= kTheRest;
  }
  const auto of_types = [&](auto x, auto m) {
    using X = decltype(x);
    using M = decltype(m);
    if (!whole || p.x_dtype != X::kDType || p.model_dtype != M::kDType) return false;
    return visit_layout<vector_of<X, M>()>(p.shape, [&](auto layout) {
      using Layout = decltype(layout);
      switch (needed) {
        case 0: return visit(ReverseStepTile<X, M, Layout, 0>{});
        case kGuidance: return visit(ReverseStepTile<X, M, Layout, kGuidance>{});
        case kLearnedVariance: return visit(ReverseStepTile<X, M, Layout, kLearnedVariance>{});
        default: return visit(ReverseStepTile<X, M, Layout, kEverything>{});
      }
    });
  };
  if (!(of_types(Float32{}, Float32{}) || of_types(Float32{}, BFloat16{}) ||
        of_types(Float32{}, Float16{}) || of_types(BFloat16{}, BFloat16{}) ||
        of_types(Float16{}, Float16{}))) {
    visit(ReverseStepBlock{});
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
