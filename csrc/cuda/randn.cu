#include "launch.cuh"
#include "randn.cuh"

namespace ddpm_fast {
namespace cuda {

const char* randn(const RandnParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr) return error;
  visit_randn(params, [&](auto body) { error = launch<decltype(body)>(params, stream); });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
