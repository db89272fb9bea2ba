// The two kernels of an op that adds up each sample's elements: shares, and what they come to.
#pragma once

#include "launch.cuh"
#include "sums.cuh"

namespace ddpm_fast {
namespace cuda {

template <class Body, class Params>
__global__ void __launch_bounds__(kThreads, Body::kMinBlocks)
    share_kernel(const __grid_constant__ Params p, const __grid_constant__ Tiles tiles) {
  constexpr int kTiles = kThreads / kWarp;  // of a block
  const int thread = threadIdx.x;
  const uint64_t tile = static_cast<uint64_t>(blockIdx.x) * kTiles + thread / kWarp;
  if (tile >= tiles.count) return;  // all lanes of a warp
  auto sums = run_tile<Body>(p, tiles, tile, thread % kWarp);
  add_lanes(sums);
  if (thread % kWarp == 0) put_share(p.scratch, tile, sums);
}

// One block a sample.
template <class Finish, class Params>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Params p, uint64_t shares) {
  constexpr int kSums = Finish::kSums;
  __shared__ Sums<kSums, TwoFloats> of_warp[kThreads / kWarp];
  const int thread = threadIdx.x, threads = blockDim.x;
  Sums<kSums, TwoFloats> sums = add_shares<kSums>(p.scratch, blockIdx.x, shares, thread, threads);
  add_lanes(sums);
  if (thread % kWarp == 0) of_warp[thread / kWarp] = sums;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < threads / kWarp; ++warp) sums += of_warp[warp];
  Finish::run(p, blockIdx.x, sums);
}

// Null, or what went wrong. Samples without elements are finished, too.
template <class Body, class Finish, class Params>
const char* launch_sums(const Params& p, void* stream) {
  static_assert(Body::kLanes == kWarp, "a warp a tile");
  if (p.shape.samples == 0) return nullptr;
  const Tiles tiles = tiles_of(p.shape, Body::kTile);
  constexpr uint64_t kTiles = kThreads / kWarp, kMostBlocks = 0x7FFFFFFF;
  if (tiles.count > kMostBlocks || static_cast<uint64_t>(p.shape.samples) > kMostBlocks) {
    return "more elements than one launch can take";
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (tiles.count > 0) {
    const unsigned blocks = static_cast<unsigned>((tiles.count + kTiles - 1) / kTiles);
    share_kernel<Body><<<blocks, kThreads, 0, on>>>(p, tiles);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  const unsigned samples = static_cast<unsigned>(p.shape.samples);
  finish_kernel<Finish><<<samples, threads_for(tiles.per_sample), 0, on>>>(p, tiles.per_sample);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ddpm_fast
