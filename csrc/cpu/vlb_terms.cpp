#include "../core/decoder.h"
#include "halves.h"
#include "kernels.h"
#include "sums.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

// What all elements of a tile share.
struct Coefficients {
  VlbRow row;
  VlbVariance variance;
  Prediction prediction;
  Cdf cdf;
  float lo, hi;
  float by_m;    // x0_hat's derivative by m, times the gradient's scale
  float by_v;    // the ratio's by v, likewise
  float simple;  // the regression's scale
  bool hybrid;
  bool first;  // t = 0
};

struct Granule {
  const float *m, *v, *x0, *z;  // v may be null
  float *by_m, *by_v;           // by_v may be null
  int count;
};

enum Sum { kSimple, kVlb, kSquaredError, kSums };

struct GranuleSums {
  GranuleSum of[kSums];
};

VecF x0_hat_of(const Coefficients& c, VecF x0, VecF z, VecF m, VecF& unclipped) {
  const VecF x_t = q_sample<Lanes>(Lanes::splat(c.row.signal), Lanes::splat(c.row.sigma), x0, z);
  unclipped =
      Lanes::splat(c.row.r) * Lanes::fma(Lanes::splat(c.row.c_m), m, Lanes::splat(c.row.c_x) * x_t);
  return clip<Lanes>(unclipped, Lanes::splat(c.lo), Lanes::splat(c.hi));
}

// Where the clip holds x0_hat fast. A NaN is not held: it reaches the gradient.
VecI held(const Coefficients& c, VecF unclipped) {
  return (unclipped < Lanes::splat(c.lo)) | (unclipped > Lanes::splat(c.hi));
}

template <bool kLearned, bool kWhole>
GranuleSums kl_granule(const Coefficients& shared, const Granule& g) {
  const Coefficients c = shared;
  const VecF zero = Lanes::splat(0.0f);
  const KlTerm<ScalarLanes> fixed(c.row, c.row.ratio_min, 1.0f);  // of an error of 1
  const VecF fixed_by_m = Lanes::splat(fixed.by_x0_hat * c.by_m);
  GranuleSums sums;
  for (int j = 0; j < kGranule; j += kPlaces) {
    for (int k = 0; k < kVectors; ++k) {
      const int i = j + k * kWidth;
      const VecF x0 = load_unaligned<VecF>(g.x0 + i), z = load_unaligned<VecF>(g.z + i);
      const VecF m = load_unaligned<VecF>(g.m + i);
      VecF unclipped;
      VecF error = x0 - x0_hat_of(c, x0, z, m, unclipped), by_m = fixed_by_m * error;
      if constexpr (kLearned) {
        const VecF v = load_unaligned<VecF>(g.v + i);
        const KlTerm<Lanes> term(c.row, log_ratio<Lanes>(c.row, c.variance, v), error);
        by_m = term.by_x0_hat * Lanes::splat(c.by_m);
        store_unaligned(g.by_v + i, term.by_ratio * Lanes::splat(c.by_v));
        const VecF nats = kWhole ? term.nats : only_before(g.count, i, term.nats);
        sums.of[kVlb].rows[k] = sums.of[kVlb].rows[k] + nats;
      }
      by_m = Lanes::select(held(c, unclipped), zero, by_m);
      if (c.hybrid) {
        VecF r = residual<Lanes>(c.prediction, Lanes::splat(c.row.signal),
                                 Lanes::splat(c.row.sigma), m, x0, z);
        by_m = Lanes::splat(c.simple) * r;
        if (!kWhole) r = only_before(g.count, i, r);
        sums.of[kSimple].rows[k] = Lanes::fma(r, r, sums.of[kSimple].rows[k]);
      }
      store_unaligned(g.by_m + i, by_m);
      if (!kWhole) error = only_before(g.count, i, error);
      sums.of[kSquaredError].rows[k] = Lanes::fma(error, error, sums.of[kSquaredError].rows[k]);
    }
  }
  return sums;
}

// t = 0, one element at a time: the samples there are few.
void decoder_granule(const Coefficients& c, const Granule& g, TileSum (&sums)[kSums]) {
  alignas(64) float x0_hat[kGranule], fast[kGranule], ratio[kGranule], r[kGranule];
  for (int j = 0; j < kGranule; j += kWidth) {
    const VecF x0 = load_unaligned<VecF>(g.x0 + j), z = load_unaligned<VecF>(g.z + j);
    const VecF m = load_unaligned<VecF>(g.m + j);
    const VecF v = g.v != nullptr ? load_unaligned<VecF>(g.v + j) : VecF{};
    VecF unclipped;
    store_unaligned(x0_hat + j, x0_hat_of(c, x0, z, m, unclipped));
    store_unaligned(fast + j, Lanes::select(held(c, unclipped), Lanes::splat(1.0f), VecF{}));
    store_unaligned(ratio + j, log_ratio<Lanes>(c.row, c.variance, v));
    store_unaligned(r + j, residual<Lanes>(c.prediction, Lanes::splat(c.row.signal),
                                           Lanes::splat(c.row.sigma), m, x0, z));
  }
  for (int j = 0; j < g.count; ++j) {
    const double log_std = 0.5 * (static_cast<double>(c.row.log_variance) - ratio[j]);
    const DecoderTerm<double> term(g.x0[j], x0_hat[j], log_std, c.cdf);
    const double error = static_cast<double>(g.x0[j]) - x0_hat[j];
    sums[kVlb].add(j, term.nats);
    sums[kSquaredError].add(j, error * error);
    g.by_m[j] = fast[j] != 0.0f ? 0.0f : static_cast<float>(term.by_mean) * c.by_m;
    if (c.hybrid) {
      sums[kSimple].add(j, static_cast<double>(r[j]) * r[j]);
      g.by_m[j] = c.simple * r[j];
    }
    if (g.by_v != nullptr) g.by_v[j] = static_cast<float>(-0.5 * term.by_log_std) * c.by_v;
  }
}

}  // namespace

void vlb_terms(const VlbTermsParams& p, int threads) {
  const int64_t elements = p.shape.elements();
  const bool learned = is_learned(p.variance);
  const Halves output(p.model_output, p.model_dtype, p.shape, learned);
  const Halves gradient(p.gradient, p.model_dtype, p.shape, learned);
  const auto kl = learned ? kl_granule<true, true> : kl_granule<false, true>;
  const auto kl_of_some = learned ? kl_granule<true, false> : kl_granule<false, false>;
  const auto t_of = [&](int64_t n) { return p.ts != nullptr ? p.ts[n] : p.t; };
  SampleSums<kSums> shares(p.shape);

  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    const VlbRow& row = p.rows[t_of(n)];
    const float per_nat = kBitsPerNat / elements * p.vlb_weight(n) * p.gradient_scale;
    Coefficients c{};
    c.row = row;
    c.variance = p.variance;
    c.prediction = p.prediction;
    c.cdf = p.cdf;
    c.lo = p.lo;
    c.hi = p.hi;
    c.by_m = row.r * row.c_m * per_nat;
    c.by_v = log_ratio_by_v(row, p.variance) * per_nat;
    c.simple = 2.0f / elements * p.simple_weight(n) * p.gradient_scale;
    c.hybrid = p.hybrid;
    c.first = t_of(n) == 0;
    if (p.noise == nullptr) noise.start(p.source.key(n, p.draw.draw(n)), begin, end);

    alignas(64) float m_buffer[kGranule], v_buffer[kGranule], x_buffer[kGranule];
    alignas(64) float z_buffer[kGranule], by_m_buffer[kGranule], by_v_buffer[kGranule];
    TileSum sums[kSums];
    for (int64_t i = begin; i < end; i += kGranule) {
      Granule g{};
      g.count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      g.z = p.noise != nullptr ? load(p.noise, p.noise_dtype, offset, g.count, z_buffer)
                               : noise.granule(i, g.count, z_buffer);
      g.x0 = load_unit(p.x0, p.x0_dtype, offset, g.count, x_buffer);
      g.m = output.load_half(0, n, i, g.count, m_buffer);
      g.by_m = by_m_buffer;
      if (p.gradient != nullptr) g.by_m = gradient.target_half(0, n, i, g.count, by_m_buffer);
      if (learned) {
        g.v = output.load_half(1, n, i, g.count, v_buffer);
        g.by_v = by_v_buffer;
        if (p.gradient != nullptr) g.by_v = gradient.target_half(1, n, i, g.count, by_v_buffer);
      }
      if (c.first) {
        decoder_granule(c, g, sums);
      } else {
        const GranuleSums found = g.count == kGranule ? kl(c, g) : kl_of_some(c, g);
        for (int k = 0; k < kSums; ++k) sums[k].add(found.of[k]);
      }
      if (p.gradient == nullptr) continue;
      gradient.commit_half(0, n, i, g.count, g.by_m);
      if (learned) gradient.commit_half(1, n, i, g.count, g.by_v);
    }
    auto& share = shares.share(n, begin);
    for (int k = 0; k < kSums; ++k) share[k] = sums[k].total();
  });

  for (int64_t n = 0; n < p.shape.samples; ++n) {
    const auto sums = shares.total(n);
    const VlbRow& row = p.rows[t_of(n)];
    double nats = sums[kVlb] / elements;
    if (!learned && t_of(n) != 0) {  // then all elements have one variance
      const KlTerm<ScalarLanes> without(row, row.ratio_min, 0.0f);
      const KlTerm<ScalarLanes> with(row, row.ratio_min, 1.0f);
      nats = without.nats - 0.5 * with.by_x0_hat * (sums[kSquaredError] / elements);
    }
    const float simple = static_cast<float>(sums[kSimple] / elements);
    const float vlb = static_cast<float>(nats * 1.4426950408889634);
    p.parts[n] = simple;
    p.parts[p.shape.samples + n] = vlb;
    p.parts[2 * p.shape.samples + n] = static_cast<float>(sums[kSquaredError] / elements);
    p.total[n] = p.vlb_weight(n) * vlb + (p.hybrid ? p.simple_weight(n) * simple : 0.0f);
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
