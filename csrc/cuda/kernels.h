// The CUDA kernels as the bindings see them. Pointers are to memory of `device`, `stream` is one of
// its streams (a cudaStream_t). Nothing here allocates or waits. A launch answers null, or what
// went wrong in CUDA's words.
#pragma once

#include "../core/add_noise.h"
#include "../core/denoising_loss.h"
#include "../core/group_norm_silu.h"
#include "../core/randn.h"
#include "../core/reverse_step.h"
#include "../core/vlb_terms.h"

namespace ddpm_fast {
namespace cuda {

const char* randn(const RandnParams& params, int device, void* stream);
const char* add_noise(const AddNoiseParams& params, int device, void* stream);
const char* reverse_step(const ReverseStepParams& params, int device, void* stream);
const char* denoising_loss(const DenoisingLossParams& params, int device, void* stream);
const char* vlb_terms(const VlbTermsParams& params, int device, void* stream);
const char* group_norm_silu(const GroupNormSiluParams& params, int device, void* stream);
const char* group_norm_silu_sums(const GroupNormSiluBwdParams& params, int device, void* stream);
const char* group_norm_silu_bwd(const GroupNormSiluBwdParams& params, int device, void* stream);

// As 1000 major + 10 minor: the highest CUDA that the driver runs, 0 if there is none, and the one
// that the kernels were built with.
int driver_version();
int runtime_version();

}  // namespace cuda
}  // namespace ddpm_fast
