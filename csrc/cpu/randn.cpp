#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

void randn(const RandnParams& p, int threads) {
  const int64_t elements = p.shape.elements();
  for_each_tile(p.shape, threads, [&](TileNoise& noise, int64_t n, int64_t begin, int64_t end) {
    noise.start(p.source.key(n, p.draw.draw(n)), begin, end);
    alignas(64) float buffer[kGranule];
    for (int64_t i = begin; i < end; i += kGranule) {
      const int count = granule_length(i, end);
      const int64_t offset = n * elements + i;
      const float* z = noise.granule(i, count, target(p.out, p.dtype, offset, count, buffer));
      float* out = target(p.out, p.dtype, offset, count, buffer);
      if (z != out) __builtin_memcpy(out, z, kGranule * sizeof(float));
      commit(p.out, p.dtype, offset, count, out);
    }
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
