// From one of group_norm_silu's problems to its kernels on a stream.
#pragma once

#include "group_norm_silu_sums.cuh"
#include "launch.cuh"

namespace ddpm_fast {
namespace cuda {

constexpr const char* kTooLarge = "more elements than one launch can take";

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Each tile's sums, added up and put where the body says.
template <class Body, class Params>
__global__ void __launch_bounds__(kThreads, Body::kMinBlocks)
    group_part_kernel(const __grid_constant__ Params p, const __grid_constant__ GroupTiles tiles) {
  auto part = Body::run(p, tiles, blockIdx.x, threadIdx.x);
  add_threads<typename Body::Layout>(tiles, part);
  Body::put(p, tiles, blockIdx.x, threadIdx.x, part);
}

// Tiles that have nothing to add up.
template <class Body, class Params>
__global__ void __launch_bounds__(kThreads, Body::kMinBlocks)
    group_tile_kernel(const __grid_constant__ Params p, const __grid_constant__ GroupTiles tiles) {
  Body::run(p, tiles, blockIdx.x, threadIdx.x);
}

template <class Body, class Params>
const char* launch_parts(const Params& p, const GroupTiles& tiles, cudaStream_t stream) {
  if (tiles.count == 0) return kTooLarge;
  group_part_kernel<Body><<<static_cast<unsigned>(tiles.count), kThreads, 0, stream>>>(p, tiles);
  return launched();
}

template <class Body, class Params>
const char* launch_tiles(const Params& p, const GroupTiles& tiles, cudaStream_t stream) {
  if (tiles.count == 0) return kTooLarge;
  group_tile_kernel<Body><<<static_cast<unsigned>(tiles.count), kThreads, 0, stream>>>(p, tiles);
  return launched();
}

}  // namespace cuda
}  // namespace ddpm_fast
