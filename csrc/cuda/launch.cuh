// From a problem to a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

template <class Body, class Params>
__global__ void __launch_bounds__(kThreads, Body::kMinBlocks)
    tile_kernel(const __grid_constant__ Params p, const __grid_constant__ Tiles tiles) {
  constexpr int kTiles = kThreads / Body::kLanes;  // of a block
  const int thread = threadIdx.x;
  const uint64_t tile = static_cast<uint64_t>(blockIdx.x) * kTiles + thread / Body::kLanes;
  if (tile >= tiles.count) return;
  run_tile<Body>(p, tiles, tile, thread % Body::kLanes);
}

// Null, or what went wrong. A stream's handle names no device: the device is made the current one,
// as the caller has done with torch's own copy of the CUDA runtime, which puts back the one before.
inline const char* select_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch would find it
  return cudaGetErrorString(error);
}

// One block for every kThreads / kLanes tiles, and none that stays: with all of a lane's loads in
// flight at once there is nothing for a loop over tiles to hide. Null, or what went wrong.
template <class Body, class Params>
const char* launch(const Params& p, void* stream) {
  const Tiles tiles = tiles_of(p.shape, Body::kTile);
  constexpr uint64_t kTiles = kThreads / Body::kLanes;
  constexpr uint64_t kMostTiles = uint64_t{0x7FFFFFFF} * (Body::kLanes == kWarp ? 1 : kTiles);
  if (tiles.count == 0) return nullptr;
  if (tiles.count > kMostTiles) return "more elements than one launch can take";
  const unsigned blocks = static_cast<unsigned>((tiles.count + kTiles - 1) / kTiles);
  tile_kernel<Body><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, tiles);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ddpm_fast
