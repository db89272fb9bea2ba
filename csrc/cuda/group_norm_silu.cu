#include "group_norm_silu_launch.cuh"
#include "group_norm_silu_whole.cuh"

namespace ddpm_fast {
namespace cuda {
namespace {

// A block a group.
template <class Finish, class Params>
__global__ void __launch_bounds__(kThreads)
    group_finish_kernel(const __grid_constant__ Params p, uint32_t channels,
                        const __grid_constant__ Divider by_channels) {
  const auto at = Finish::place(p, channels, by_channels, blockIdx.x, threadIdx.x, blockDim.x);
  Sums<1> sum = Finish::sum(p, at);
  add_block(sum);
  const float about = Finish::mean(p, at, sum);
  Sums<2> sums = Finish::sums_about(p, at, about);
  add_block(sums);
  Finish::put(p, at, about, sums);
}

// Groups that a block holds: a warp a group between its two halves.
template <class Body, class Params>
__global__ void __launch_bounds__(kWarp* Body::kMostWarps)
    group_whole_kernel(const __grid_constant__ Params p, const __grid_constant__ GroupTiles tiles) {
  __shared__ typename Body::Shared shared;
  const uint32_t tile = blockIdx.x, warp = threadIdx.x / kWarp;
  typename Body::Held held;
  auto moments = Body::read(p, tiles, tile, threadIdx.x, held);
  add_threads<typename Body::Layout, Body::kMostWarps, Body::kMostLanes>(tiles, moments);
  Body::tell(tiles, tile, threadIdx.x, moments, shared);
  __syncthreads();
  using Finish = GroupNormSiluFinish<1>;
  const uint32_t groups = Body::groups_of(tiles, tile);
  for (uint32_t group = warp; group < groups; group += tiles.warps) {
    const auto at = Body::place(tiles, tile, group, threadIdx.x % kWarp, shared);
    Sums<1> sum = Finish::sum(p, at);
    add_warp(sum);
    const float about = Finish::mean(p, at, sum);
    Sums<2> sums = Finish::sums_about(p, at, about);
    add_warp(sums);
    Finish::put(p, at, about, sums);
  }
  __syncthreads();
  Body::write(p, tiles, tile, threadIdx.x, held, shared);
}

template <class Layout>
const char* launch_group_norm_silu(const GroupNormSiluParams& p, cudaStream_t stream) {
  if constexpr (Layout::kElements > 1) {
    using Whole = GroupNormSiluWhole<Layout>;
    const GroupTiles tiles = Whole::tiles(p.shape);
    if (tiles.count > 0) {
      const unsigned blocks = static_cast<unsigned>(tiles.count);
      group_whole_kernel<Whole><<<blocks, kWarp * tiles.warps, 0, stream>>>(p, tiles);
      return launched();
    }
  }
  const char* error =
      launch_parts<GroupNormSiluMoments<Layout>>(p, group_tiles<Layout>(p.shape, p.chunk), stream);
  if (error != nullptr) return error;
  const int64_t groups = p.shape.samples * p.shape.groups, channels = p.shape.group_channels();
  const int64_t shares = p.chunks * channels;
  if (groups >> 31 != 0 || shares >> 31 != 0) return kTooLarge;
  group_finish_kernel<GroupNormSiluFinish<4>>
      <<<static_cast<unsigned>(groups), threads_for(shares), 0, stream>>>(
          p, static_cast<uint32_t>(channels), divider(channels));
  error = launched();
  if (error != nullptr) return error;
  return launch_tiles<GroupNormSiluApply<Layout>>(p, group_tiles<Layout>(p.shape, 0), stream);
}

}  // namespace

const char* group_norm_silu(const GroupNormSiluParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr || params.shape.samples * params.shape.channels == 0 ||
      params.shape.pixels() == 0) {
    return error;
  }
  visit_group_norm_silu(params, [&](auto layout) {
    error = launch_group_norm_silu<decltype(layout)>(params, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
