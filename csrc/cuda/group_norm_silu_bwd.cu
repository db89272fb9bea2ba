#include "group_norm_silu_bwd.cuh"
#include "group_norm_silu_launch.cuh"

namespace ddpm_fast {
namespace cuda {
namespace {

// A block kWarp of a sample's sums.
template <class Finish, class Params>
__global__ void __launch_bounds__(kThreads)
    group_sums_kernel(const __grid_constant__ Params p, uint32_t blocks_of_sample) {
  __shared__ Sums<1> of_warp[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t n = blockIdx.x / blocks_of_sample;
  const int64_t i = (blockIdx.x - n * blocks_of_sample) * int64_t{kWarp} + lane;
  Sums<1> sum = Finish::run(p, n, i, warp);
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warp[w][lane];
  Finish::put(p, n, i, sum);
}

template <class Layout>
const char* launch_sums_of(const GroupNormSiluBwdParams& p, cudaStream_t stream) {
  const GroupTiles tiles = group_tiles<Layout>(p.shape, p.chunk);
  const char* error = launch_parts<GroupNormSiluSums<Layout>>(p, tiles, stream);
  if (error != nullptr || tiles.chunks == 1) return error;
  const int64_t of_sample = (GroupNormSiluSumsFinish::sums_of_sample(p) + kWarp - 1) / kWarp;
  const int64_t blocks = p.shape.samples * of_sample;
  if (blocks >> 31 != 0) return kTooLarge;
  group_sums_kernel<GroupNormSiluSumsFinish>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, static_cast<uint32_t>(of_sample));
  return launched();
}

bool is_empty(const GroupNormShape& shape) {
  return shape.samples * shape.channels == 0 || shape.pixels() == 0;
}

}  // namespace

const char* group_norm_silu_sums(const GroupNormSiluBwdParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr || is_empty(params.shape)) return error;
  visit_group_norm_silu_bwd(params, [&](auto layout) {
    error = launch_sums_of<decltype(layout)>(params, static_cast<cudaStream_t>(stream));
  });
  return error;
}

const char* group_norm_silu_bwd(const GroupNormSiluBwdParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr || is_empty(params.shape)) return error;
  visit_group_norm_silu_bwd(params, [&](auto layout) {
    using Layout = decltype(layout);
    error = launch_tiles<GroupNormSiluBwd<Layout>>(params, group_tiles<Layout>(params.shape, 0),
                                                   static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
