#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

void add_noise(const AddNoiseParams& p, int threads) {
  const int64_t elements = p.shape.elements();
  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    const int64_t t = p.ts != nullptr ? p.ts[n] : p.t;
    const VecF signal = Lanes::splat(p.weights[2 * t]);
    const VecF sigma = Lanes::splat(p.weights[2 * t + 1]);
    if (p.noise == nullptr) {
      noise.start(p.source.key(n, draw_of(kStreamForwardNoise, p.index)), begin, end);
    }
    alignas(64) float x_buffer[kGranule], z_buffer[kGranule], out_buffer[kGranule];
    for (int64_t i = begin; i < end; i += kGranule) {
      const int count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      const float* z = p.noise != nullptr ? load(p.noise, p.noise_dtype, offset, count, z_buffer)
                                          : noise.granule(i, z_buffer);
      const float* x0 = load(p.x0, p.x0_dtype, offset, count, x_buffer);
      float* out = target(p.out, p.out_dtype, offset, count, out_buffer);
      const bool pixels = p.x0_dtype == DType::kUInt8;
      for (int j = 0; j < kGranule; j += kWidth) {
        VecF x = load_unaligned<VecF>(x0 + j);
        if (pixels) x = unit_from_pixel<Lanes>(x);
        const VecF x_t = q_sample<Lanes>(signal, sigma, x, load_unaligned<VecF>(z + j));
        store_unaligned(out + j, x_t);
      }
      commit(p.out, p.out_dtype, offset, count, out);
    }
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
