#include "launch.cuh"
#include "reverse_step.cuh"

namespace ddpm_fast {
namespace cuda {

const char* reverse_step(const ReverseStepParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr) return error;
  visit_reverse_step(params, [&](auto body) { error = launch<decltype(body)>(params, stream); });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
