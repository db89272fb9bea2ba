// One call of each op that draws noise, of a random shape and random options, with one thread and
// with several: the same bits, every element written.
#pragma once

#include "../../csrc/cpu/kernels.h"
#include "exact_memory.h"

namespace sanitize {

namespace isa = ddpm_fast::DDPM_FAST_ISA;
using ddpm_fast::Shape;

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
inline DType a_float() { return kFloats[pick(3)]; }
constexpr int64_t kSteps = 7;

// Small and odd ones, some that fill granules and tiles, some that are worth several threads.
inline Shape a_shape() {
  Shape shape{pick(4), 1 + pick(6), 1 + pick(70), chance()};
  if (pick(4) == 0) shape = {1 + pick(3), 1 + pick(5), 1000 + pick(9000), chance()};
  if (pick(12) == 0) shape = {1 + pick(3), 200 + pick(400), 1 + pick(40), chance()};
  if (pick(20) == 0) shape.channels = 0;
  // channels_last is said only of what is not contiguous as well
  if (shape.channels < 2 || shape.pixels < 2) shape.channels_last = false;
  return shape;
}

// What a call is addressed by; the arrays live as long as it.
struct Address {
  Integers seeds, ids, indices, steps;
  ddpm_fast::NoiseSource source;
  ddpm_fast::DrawSource draw;

  explicit Address(int64_t samples) {
    const auto any = [] {
      return static_cast<int64_t>(static_cast<uint64_t>(random_bits()) << 32 | random_bits());
    };
    if (chance()) seeds = integers(samples, any);
    if (chance()) ids = integers(samples, any);
    if (chance()) indices = integers(samples, [] { return pick(1 << 24); });
    if (chance()) steps = integers(samples, [] { return pick(kSteps); });
    source = {static_cast<uint64_t>(any()), seeds.get(), ids.get()};
    draw = {static_cast<uint32_t>(pick(256)), pick(1 << 24), indices.get()};
  }
};

inline Memory perhaps(bool wanted, int64_t count, DType dtype) {
  return wanted ? Memory::of_values(count, dtype) : Memory();
}

// call(threads, outputs) on fresh outputs; those that are empty are not asked for.
template <class Outputs, class Call>
void compare(const char* op, const Outputs& outputs, const Call& call) {
  auto alone = outputs(), shared = outputs();
  call(1, alone);
  call(2 + static_cast<int>(pick(3)), shared);
  for (size_t i = 0; i < alone.size(); ++i) {
    expect(alone[i].same(shared[i]), op);
    for (int64_t j = 0; j < alone[i].count(); ++j) expect(!alone[i].unwritten(j), op);
  }
}

using Outputs = std::vector<Memory>;
template <class... Each>
Outputs outputs_of(Each&&... each) {
  Outputs all;
  (all.push_back(std::move(each)), ...);
  return all;
}

inline void randn_case() {
  ddpm_fast::RandnParams p{};
  p.shape = a_shape();
  p.dtype = a_float();
  const Address address(p.shape.samples);
  p.source = address.source;
  p.draw = address.draw;
  const int64_t count = p.shape.samples * p.shape.elements();
  compare(
      "randn", [&] { return outputs_of(Memory(count, p.dtype)); },
      [&](int threads, const Outputs& out) {
        p.out = out[0].get();
        isa::randn(p, threads);
      });
}

inline void add_noise_case() {
  ddpm_fast::AddNoiseParams p{};
  p.shape = a_shape();
  const int64_t count = p.shape.samples * p.shape.elements();
  const Memory x0 = Memory::of_values(count, pick(4) == 0 ? DType::kUInt8 : a_float());
  const Memory noise = perhaps(pick(3) == 0, count, a_float());
  const Memory weights = of_floats(2 * kSteps);
  const Address address(p.shape.samples);
  p.x0 = x0.get();
  p.x0_dtype = x0.dtype();
  p.noise = noise.get();
  p.noise_dtype = noise.dtype();
  p.source = address.source;
  p.draw = address.draw;
  p.weights = weights.as<float>();
  p.num_steps = kSteps;
  p.t = pick(kSteps);
  p.ts = address.steps.get();
  p.out_dtype = a_float();
  compare(
      "add_noise", [&] { return outputs_of(Memory(count, p.out_dtype)); },
      [&](int threads, const Outputs& out) {
        p.out = out[0].get();
        isa::add_noise(p, threads);
      });
}

inline void reverse_step_case() {
  ddpm_fast::ReverseStepParams p{};
  p.shape = a_shape();
  p.variance = static_cast<ddpm_fast::Variance>(pick(4));
  const int64_t samples = p.shape.samples, count = samples * p.shape.elements();
  const int64_t of_model = p.variance == ddpm_fast::Variance::kNone ? count : 2 * count;
  const Memory x = Memory::of_values(count, a_float());
  const Memory model = Memory::of_values(of_model, a_float());
  const Memory uncond = perhaps(chance(), of_model, model.dtype());
  const Memory x0 = perhaps(pick(4) == 0, count, a_float());
  const Memory noise = perhaps(pick(4) == 0, count, a_float());
  const Memory rows = of_floats(9 * kSteps);
  rows.as<float>()[9 * (kSteps - 1) + 6] = 0.0f;  // the last sigma
  const Address address(samples);
  const Integers timesteps = integers(kSteps, [] { return pick(1 << 24); });
  const Memory scales = perhaps(uncond.get() != nullptr && chance(), samples, DType::kFloat32);
  const bool in_place = chance(), with_x0 = chance(), with_lowp = chance();
  const DType lowp = one_of({DType::kBFloat16, DType::kFloat16});
  p.model_output = model.get();
  p.model_output_uncond = uncond.get();
  p.x0 = x0.get();
  p.noise = noise.get();
  p.x_dtype = x.dtype();
  p.model_dtype = model.dtype();
  p.x0_dtype = x0.dtype();
  p.noise_dtype = noise.dtype();
  p.out_lowp_dtype = lowp;
  p.source = address.source;
  p.lo = chance() ? -1.0f : -__builtin_inff();
  p.hi = -p.lo;
  p.guidance_scale = 1.5f;
  p.guidance_scales = scales.as<float>();
  p.guidance_scales_stride = scales.get() != nullptr && chance() ? 1 : 0;
  p.rows = rows.as<ddpm_fast::StepRow>();
  p.timesteps = timesteps.get();
  p.num_rows = kSteps;
  p.step = pick(kSteps);
  p.steps = samples > 0 ? address.steps.get() : nullptr;
  p.steps_stride = chance() ? 1 : 0;
  std::unique_ptr<int32_t> nan_step(chance() ? new int32_t(INT32_MAX) : nullptr);
  p.nan_step = nan_step.get();
  const auto outputs = [&] {
    Memory out(count, x.dtype());
    if (in_place && count > 0) std::memcpy(out.get(), x.get(), static_cast<size_t>(x.bytes()));
    return outputs_of(std::move(out), Memory(with_x0 ? count : 0, DType::kFloat32),
                      Memory(with_lowp ? count : 0, lowp));
  };
  compare("reverse_step", outputs, [&](int threads, const Outputs& out) {
    p.x = in_place ? out[0].get() : x.get();
    p.out = out[0].get();
    p.out_x0 = with_x0 ? out[1].get() : nullptr;
    p.out_lowp = with_lowp ? out[2].get() : nullptr;
    isa::reverse_step(p, threads);
  });
  expect(nan_step == nullptr || *nan_step == INT32_MAX, "reverse_step: a NaN");
}

// What the two objectives have in common.
struct Objective {
  Shape shape = a_shape();
  Address address{shape.samples};
  bool doubled, graded = chance();
  int64_t samples, count, of_model;
  Memory model, x0, noise, weights;

  explicit Objective(bool doubled) : doubled(doubled) {
    if (shape.channels == 0) shape.channels = 1;
    samples = shape.samples;
    count = samples * shape.elements();
    of_model = doubled ? 2 * count : count;
    model = Memory::of_values(of_model, a_float());
    x0 = Memory::of_values(count, pick(4) == 0 ? DType::kUInt8 : a_float());
    noise = perhaps(pick(4) == 0, count, a_float());
    weights = perhaps(chance(), samples, DType::kFloat32);
  }

  template <class Params>
  void fill(Params& p) const {
    p.model_output = model.get();
    p.model_dtype = model.dtype();
    p.x0 = x0.get();
    p.x0_dtype = x0.dtype();
    p.noise = noise.get();
    p.noise_dtype = noise.dtype();
    p.shape = shape;
    p.source = address.source;
    p.draw = address.draw;
    p.gradient_scale = 0.5f;
    p.num_steps = kSteps;
    p.t = pick(kSteps);
    p.ts = address.steps.get();
    p.prediction = static_cast<ddpm_fast::Prediction>(pick(3));
  }
  Memory gradient() const { return Memory(graded ? of_model : 0, model.dtype()); }
};

inline void denoising_loss_case() {
  const Objective o(chance());
  const Memory forward = of_floats(2 * kSteps);
  ddpm_fast::DenoisingLossParams p{};
  o.fill(p);
  p.doubled = o.doubled;
  p.forward_weights = forward.as<float>();
  p.weights = o.weights.as<float>();
  compare(
      "denoising_loss", [&] { return outputs_of(unwritten_floats(o.samples), o.gradient()); },
      [&](int threads, const Outputs& out) {
        p.loss = out[0].as<float>();
        p.gradient = o.graded ? out[1].get() : nullptr;
        isa::denoising_loss(p, threads);
      });
}

inline void vlb_terms_case() {
  ddpm_fast::VlbTermsParams p{};
  p.variance = static_cast<ddpm_fast::VlbVariance>(pick(4));
  const Objective o(is_learned(p.variance));
  const Memory rows = of_floats(9 * kSteps);
  o.fill(p);
  p.rows = rows.as<ddpm_fast::VlbRow>();
  p.lo = chance() ? -1.0f : -__builtin_inff();
  p.hi = -p.lo;
  p.cdf = static_cast<ddpm_fast::Cdf>(pick(2));
  p.hybrid = chance();
  p.simple_weights = p.hybrid ? o.weights.as<float>() : nullptr;
  p.vlb_weights = p.hybrid ? nullptr : o.weights.as<float>();
  const auto outputs = [&] {
    return outputs_of(unwritten_floats(o.samples), unwritten_floats(3 * o.samples), o.gradient());
  };
  compare("vlb_terms", outputs, [&](int threads, const Outputs& out) {
    p.total = out[0].as<float>();
    p.parts = out[1].as<float>();
    p.gradient = o.graded ? out[2].get() : nullptr;
    isa::vlb_terms(p, threads);
  });
}

}  // namespace sanitize
