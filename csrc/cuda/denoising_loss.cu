#include "denoising_loss.cuh"
#include "launch_sums.cuh"

namespace ddpm_fast {
namespace cuda {

const char* denoising_loss(const DenoisingLossParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr) return error;
  const ScaledDenoisingLossParams scaled(params);
  visit_denoising_loss(params, [&](auto body) {
    error = launch_sums<decltype(body), DenoisingLossFinish>(scaled, stream);
  });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
