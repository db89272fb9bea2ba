#include "halves.h"
#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

// What all elements of a tile share.
struct Coefficients {
  StepRow row;
  Variance variance;
  VecF scale, lo, hi;
};

// The step of most samplers on a whole granule, straight from and to memory; which lanes held no
// NaN. The general form below, through float32 buffers, costs bfloat16 a quarter more.
template <class X, class M>
Lanes::Numbers plain_granule(const Coefficients& c, const void* x_base, const void* m_base,
                             const float* z, void* out_base) {
  const auto* x_in = static_cast<const typename X::Element*>(x_base);
  const auto* m_in = static_cast<const typename M::Element*>(m_base);
  auto* out = static_cast<typename X::Element*>(out_base);
  const StepRow row = c.row;  // copies: what lies in memory would be read again after each store
  const VecF lo = c.lo, hi = c.hi, sigma = Lanes::splat(row.sigma);
  Lanes::Numbers numbers = Lanes::all_numbers();
  for (int j = 0; j < kGranule; j += 2 * kWidth) {
    VecF x[2], m[2], result[2];
    X::load_pair(x_in + j, x[0], x[1]);
    M::load_pair(m_in + j, m[0], m[1]);
    for (int i = 0; i < 2; ++i) {
      const VecF x0_hat = clip<Lanes>(predict_x0<Lanes>(row, x[i], m[i]), lo, hi);
      const VecF z_i = load_unaligned<VecF>(z + j + i * kWidth);
      result[i] = step_to<Lanes>(row, x0_hat, x[i], m[i], sigma * z_i);
      numbers &= Lanes::numbers(result[i]);
    }
    X::store_pair(out + j, result[0], result[1]);
  }
  return numbers;
}

using PlainGranule = Lanes::Numbers (*)(const Coefficients&, const void*, const void*, const float*,
                                        void*);

PlainGranule plain_granule_of(DType x, DType m) {
  if (x == DType::kBFloat16 && m == x) return plain_granule<BFloat16, BFloat16>;
  if (x == DType::kFloat16 && m == x) return plain_granule<Float16, Float16>;
  if (x != DType::kFloat32) return nullptr;
  if (m == DType::kBFloat16) return plain_granule<Float32, BFloat16>;
  if (m == DType::kFloat16) return plain_granule<Float32, Float16>;
  return plain_granule<Float32, Float32>;
}

struct Granule {
  const float *x, *m, *u, *v, *x0, *z;  // u, v and x0 may be null
  float *out, *out_x0;                  // out_x0 may be null
};

// The step with everything it can do; which lanes held no NaN.
Lanes::Numbers general_granule(const Coefficients& c, const Granule& g) {
  Lanes::Numbers numbers = Lanes::all_numbers();
  for (int j = 0; j < kGranule; j += kWidth) {
    const VecF x = load_unaligned<VecF>(g.x + j);
    VecF m = load_unaligned<VecF>(g.m + j);
    VecF sigma = Lanes::splat(c.row.sigma);
    if (g.u != nullptr) m = guided<Lanes>(m, load_unaligned<VecF>(g.u + j), c.scale);
    if (g.v != nullptr) {
      sigma = learned_sigma<Lanes>(c.row, c.variance, load_unaligned<VecF>(g.v + j));
    }
    VecF x0_hat = g.x0 != nullptr ? load_unaligned<VecF>(g.x0 + j) : predict_x0<Lanes>(c.row, x, m);
    x0_hat = clip<Lanes>(x0_hat, c.lo, c.hi);
    const VecF noise = sigma * load_unaligned<VecF>(g.z + j);
    const VecF result = step_to<Lanes>(c.row, x0_hat, x, m, noise);
    numbers &= Lanes::numbers(result);
    store_unaligned(g.out + j, result);
    if (g.out_x0 != nullptr) store_unaligned(g.out_x0 + j, x0_hat);
  }
  return numbers;
}

void lower(int32_t* word, int32_t value) {
  int32_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

}  // namespace

void reverse_step(const ReverseStepParams& p, int threads) {
  const int64_t elements = p.shape.elements();
  const bool doubled = p.variance != Variance::kNone;
  const Halves cond(p.model_output, p.model_dtype, p.shape, doubled);
  const Halves uncond(p.model_output_uncond, p.model_dtype, p.shape, doubled);
  const bool learned = is_learned(p.variance);
  const bool plain = p.variance == Variance::kNone && p.model_output_uncond == nullptr &&
                     p.x0 == nullptr && p.out_x0 == nullptr && p.out_lowp == nullptr;
  const PlainGranule plain_granule = plain ? plain_granule_of(p.x_dtype, p.model_dtype) : nullptr;

  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    const int64_t step = p.step_of(n);
    const Coefficients c{p.rows[step], p.variance, Lanes::splat(p.guidance_scale_of(n)),
                         Lanes::splat(p.lo), Lanes::splat(p.hi)};
    alignas(64) float x_buffer[kGranule], m_buffer[kGranule], u_buffer[kGranule];
    alignas(64) float v_buffer[kGranule], x0_buffer[kGranule], z_buffer[kGranule];
    alignas(64) float out_buffer[kGranule], out_x0_buffer[kGranule];

    // Where sigma is 0 nothing is drawn and the term is +0.
    const bool noisy = c.row.sigma != 0.0f;
    if (!noisy) __builtin_memset(z_buffer, 0, sizeof z_buffer);
    if (noisy && p.noise == nullptr) {
      noise.start(p.source.key(n, draw_of(kStreamReverseStep, p.timesteps[step])), begin, end);
    }
    Lanes::Numbers numbers = Lanes::all_numbers();
    bool nan = false;
    for (int64_t i = begin; i < end; i += kGranule) {
      const int count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      const float* z = z_buffer;
      if (noisy) {
        z = p.noise == nullptr ? noise.granule(i, count, z_buffer)
                               : load(p.noise, p.noise_dtype, offset, count, z_buffer);
      }
      if (plain_granule != nullptr && count == kGranule) {
        numbers &= plain_granule(c, element(p.x, p.x_dtype, offset),
                                 element(p.model_output, p.model_dtype, offset), z,
                                 element(p.out, p.x_dtype, offset));
        continue;
      }
      Granule g{};
      g.z = z;
      g.x = load(p.x, p.x_dtype, offset, count, x_buffer);
      g.m = cond.load_half(0, n, i, count, m_buffer);
      if (p.model_output_uncond != nullptr) g.u = uncond.load_half(0, n, i, count, u_buffer);
      if (learned && noisy) g.v = cond.load_half(1, n, i, count, v_buffer);
      if (p.x0 != nullptr) g.x0 = load(p.x0, p.x0_dtype, offset, count, x0_buffer);
      g.out = target(p.out, p.x_dtype, offset, count, out_buffer);
      if (p.out_x0 != nullptr) {
        g.out_x0 = target(p.out_x0, DType::kFloat32, offset, count, out_x0_buffer);
      }
      const Lanes::Numbers found = general_granule(c, g);
      if (count == kGranule) {
        numbers &= found;
      } else {  // past the end there may be anything
        for (int j = 0; j < count; ++j) nan = nan || g.out[j] != g.out[j];
      }
      commit(p.out, p.x_dtype, offset, count, g.out);
      if (p.out_x0 != nullptr) commit(p.out_x0, DType::kFloat32, offset, count, g.out_x0);
      if (p.out_lowp != nullptr) commit(p.out_lowp, p.out_lowp_dtype, offset, count, g.out);
    }
    nan = nan || Lanes::any_nan(numbers);
    if (p.nan_step != nullptr && nan) lower(p.nan_step, static_cast<int32_t>(step));
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
