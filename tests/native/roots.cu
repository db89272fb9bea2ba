// On a GPU: the root that core/lanes.h spells out against the compiler's own, for every float in
// [2^-101, 2^126]. Prints how many differ; exits with 1 if any does.
#include <cstdio>

#include "../../csrc/core/lanes.h"

using ddpm_fast::ScalarLanes;

__global__ void compare(uint32_t first, uint32_t count, unsigned long long* different) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = __uint_as_float(first + i);
  if (ScalarLanes::sqrt(x) != __fsqrt_rn(x)) atomicAdd(different, 1ull);
}

int main() {
  const uint32_t first = (127u - 101u) << 23, last = (127u + 126u) << 23;
  unsigned long long *different, found = 0;
  if (cudaMalloc(&different, sizeof found) != cudaSuccess) return 2;
  cudaMemset(different, 0, sizeof found);
  const uint32_t count = last - first + 1;
  compare<<<(count + 255) / 256, 256>>>(first, count, different);
  if (cudaMemcpy(&found, different, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
  std::printf("%u roots compared, %llu differ\n", count, found);
  return found != 0;
}
