#include "halves.h"
#include "kernels.h"
#include "sums.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

struct Coefficients {
  VecF signal, sigma, scale;  // scale: of the gradient
};

// The gradient of a granule, and the sum of its squared residuals. Elements from `count` on have no
// meaning.
template <Prediction kPrediction, bool kWhole>
GranuleSum granule(const Coefficients& shared, const float* m, const float* x0, const float* z,
                   int count, float* gradient) {
  const Coefficients c = shared;  // what lies in memory would be read again after each store
  GranuleSum sum;
  for (int j = 0; j < kGranule; j += kPlaces) {
    for (int k = 0; k < kVectors; ++k) {
      const int i = j + k * kWidth;
      VecF x{}, noise{};
      if constexpr (kPrediction != Prediction::kEpsilon) x = load_unaligned<VecF>(x0 + i);
      if constexpr (kPrediction != Prediction::kSample) noise = load_unaligned<VecF>(z + i);
      VecF r =
          residual<Lanes>(kPrediction, c.signal, c.sigma, load_unaligned<VecF>(m + i), x, noise);
      store_unaligned(gradient + i, c.scale * r);
      if constexpr (!kWhole) r = only_before(count, i, r);
      sum.rows[k] = Lanes::fma(r, r, sum.rows[k]);
    }
  }
  return sum;
}

template <Prediction kPrediction>
void run(const DenoisingLossParams& p, int threads, SampleSums<1>& sums) {
  const int64_t elements = p.shape.elements();
  const Halves output(p.model_output, p.model_dtype, p.shape, p.doubled);
  const Halves gradient(p.gradient, p.model_dtype, p.shape, p.doubled);
  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    const int64_t t = p.ts != nullptr ? p.ts[n] : p.t;
    const double scale = 2.0 / elements * p.weight(n) * p.gradient_scale;
    const Coefficients c{Lanes::splat(p.forward_weights[2 * t]),
                         Lanes::splat(p.forward_weights[2 * t + 1]),
                         Lanes::splat(static_cast<float>(scale))};
    constexpr bool kDraws = kPrediction != Prediction::kSample;
    if (kDraws && p.noise == nullptr) {
      noise.start(p.source.key(n, p.draw.draw(n)), begin, end);
    }
    alignas(64) float m_buffer[kGranule], x_buffer[kGranule], z_buffer[kGranule];
    alignas(64) float gradient_buffer[kGranule], zeros[kGranule] = {};
    TileSum sum;
    for (int64_t i = begin; i < end; i += kGranule) {
      const int count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      const float *z = nullptr, *x0 = nullptr;
      if (kDraws) {
        z = p.noise != nullptr ? load(p.noise, p.noise_dtype, offset, count, z_buffer)
                               : noise.granule(i, count, z_buffer);
      }
      if (kPrediction != Prediction::kEpsilon) {
        x0 = load_unit(p.x0, p.x0_dtype, offset, count, x_buffer);
      }
      const float* m = output.load_half(0, n, i, count, m_buffer);
      const bool wanted = p.gradient != nullptr;
      float* out = wanted ? gradient.target_half(0, n, i, count, gradient_buffer) : gradient_buffer;
      sum.add(count == kGranule ? granule<kPrediction, true>(c, m, x0, z, count, out)
                                : granule<kPrediction, false>(c, m, x0, z, count, out));
      if (!wanted) continue;
      gradient.commit_half(0, n, i, count, out);
      if (!p.doubled) continue;
      float* second = gradient.target_half(1, n, i, count, zeros);
      if (second != zeros) __builtin_memset(second, 0, kGranule * sizeof(float));
      gradient.commit_half(1, n, i, count, second);
    }
    sums.share(n, begin)[0] = sum.total();
  });
}

}  // namespace

void denoising_loss(const DenoisingLossParams& p, int threads) {
  SampleSums<1> sums(p.shape);
  switch (p.prediction) {
    case Prediction::kEpsilon: run<Prediction::kEpsilon>(p, threads, sums); break;
    case Prediction::kSample: run<Prediction::kSample>(p, threads, sums); break;
    case Prediction::kV: run<Prediction::kV>(p, threads, sums); break;
  }
  for (int64_t n = 0; n < p.shape.samples; ++n) {
    p.loss[n] = p.weight(n) * static_cast<float>(sums.total(n)[0] / p.shape.elements());
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
