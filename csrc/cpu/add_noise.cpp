#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

namespace {

struct Coefficients {
  VecF signal, sigma;
  bool pixels;
};

VecF noised(const Coefficients& c, VecF x0, VecF z) {
  if (c.pixels) x0 = unit_from_pixel<Lanes>(x0 - Lanes::splat(127.5f));
  return q_sample<Lanes>(c.signal, c.sigma, x0, z);
}

// A whole granule straight from and to memory.
template <class From, class To>
void direct_granule(const Coefficients& shared, const void* x0_base, const float* z,
                    void* out_base) {
  const auto* x0 = static_cast<const typename From::Element*>(x0_base);
  auto* out = static_cast<typename To::Element*>(out_base);
  Coefficients c = shared;
  c.pixels = std::is_same_v<From, Pixel>;
  for (int j = 0; j < kGranule; j += kWidth) {
    To::store(out + j, noised(c, From::load(x0 + j), load_unaligned<VecF>(z + j)));
  }
}

using DirectGranule = void (*)(const Coefficients&, const void*, const float*, void*);

DirectGranule direct_granule_of(DType x0, DType out) {
  if (out == DType::kFloat32 && x0 == DType::kFloat32) return direct_granule<Float32, Float32>;
  if (out == DType::kFloat32 && x0 == DType::kUInt8) return direct_granule<Pixel, Float32>;
  if (out == DType::kBFloat16 && x0 == out) return direct_granule<BFloat16, BFloat16>;
  if (out == DType::kBFloat16 && x0 == DType::kUInt8) return direct_granule<Pixel, BFloat16>;
  if (out == DType::kFloat16 && x0 == out) return direct_granule<Float16, Float16>;
  return nullptr;
}

}  // namespace

void add_noise(const AddNoiseParams& p, int threads) {
  const int64_t elements = p.shape.elements();
  const DirectGranule direct_granule = direct_granule_of(p.x0_dtype, p.out_dtype);
  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    const int64_t t = p.ts != nullptr ? p.ts[n] : p.t;
    const Coefficients c{Lanes::splat(p.weights[2 * t]), Lanes::splat(p.weights[2 * t + 1]),
                         p.x0_dtype == DType::kUInt8};
    if (p.noise == nullptr) noise.start(p.source.key(n, p.draw.draw(n)), begin, end);
    alignas(64) float x_buffer[kGranule], z_buffer[kGranule], out_buffer[kGranule];
    for (int64_t i = begin; i < end; i += kGranule) {
      const int count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      const float* z = p.noise != nullptr ? load(p.noise, p.noise_dtype, offset, count, z_buffer)
                                          : noise.granule(i, count, z_buffer);
      if (direct_granule != nullptr && count == kGranule) {
        direct_granule(c, element(p.x0, p.x0_dtype, offset), z,
                       element(p.out, p.out_dtype, offset));
        continue;
      }
      const float* x0 = load(p.x0, p.x0_dtype, offset, count, x_buffer);
      float* out = target(p.out, p.out_dtype, offset, count, out_buffer);
      for (int j = 0; j < kGranule; j += kWidth) {
        const VecF x = load_unaligned<VecF>(x0 + j);
        store_unaligned(out + j, noised(c, x, load_unaligned<VecF>(z + j)));
      }
      commit(p.out, p.out_dtype, offset, count, out);
    }
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
