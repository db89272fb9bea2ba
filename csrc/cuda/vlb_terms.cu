#include "launch_sums.cuh"
#include "vlb_terms.cuh"

namespace ddpm_fast {
namespace cuda {

const char* vlb_terms(const VlbTermsParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr) return error;
  const ScaledVlbTermsParams scaled(params);
  visit_vlb_terms(params, [&](auto body) {
    error = launch_sums<decltype(body), VlbTermsFinish>(scaled, stream);
  });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
