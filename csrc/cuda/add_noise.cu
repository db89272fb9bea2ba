#include "add_noise.cuh"
#include "launch.cuh"

namespace ddpm_fast {
namespace cuda {

const char* add_noise(const AddNoiseParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr) return error;
  visit_add_noise(params, [&](auto body) { error = launch<decltype(body)>(params, stream); });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
