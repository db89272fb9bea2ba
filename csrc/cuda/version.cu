#include <cuda_runtime.h>

#include "kernels.h"

namespace ddpm_fast {
namespace cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace cuda
}  // namespace ddpm_fast
