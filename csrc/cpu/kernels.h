// The CPU kernels as the bindings see them, one set an instruction set.
#pragma once

#include "../core/add_noise.h"
#include "../core/conv2d.h"
#include "../core/denoising_loss.h"
#include "../core/group_norm_silu.h"
#include "../core/randn.h"
#include "../core/reverse_step.h"
#include "../core/vlb_terms.h"

namespace ddpm_fast {

#define DDPM_FAST_DECLARE_KERNELS(isa)                                          \
  namespace isa {                                                               \
  void randn(const RandnParams& params, int threads);                           \
  void add_noise(const AddNoiseParams& params, int threads);                    \
  void reverse_step(const ReverseStepParams& params, int threads);              \
  void denoising_loss(const DenoisingLossParams& params, int threads);          \
  void vlb_terms(const VlbTermsParams& params, int threads);                    \
  void group_norm_silu(const GroupNormSiluParams& params, int threads);         \
  void group_norm_silu_sums(const GroupNormSiluBwdParams& params, int threads); \
  void group_norm_silu_bwd(const GroupNormSiluBwdParams& params, int threads);  \
  void conv2d(const Conv2dParams& params, int threads);                         \
  void winograd_conv2d(const Conv2dParams& params, int threads);                \
  void attention(const AttentionParams& params, int threads);                   \
  }

DDPM_FAST_DECLARE_KERNELS(avx512)
DDPM_FAST_DECLARE_KERNELS(avx2)
DDPM_FAST_DECLARE_KERNELS(portable)

// The set in use. `threads` bounds how many threads a call may take.
namespace cpu {

const char* isa();                     // "avx512", "avx2" or "portable"
bool isa_supported(const char* name);  // built, and this processor has it
void set_isa(const char* name);        // the caller has asked isa_supported

// Whether parallel regions may have several threads: an OpenMP runtime is there.
bool has_threads();

// Ends the threads that OpenMP keeps for the calling one, which starts others when it next needs
// some; whether it could.
bool release_threads();

void randn(const RandnParams& params, int threads);
void add_noise(const AddNoiseParams& params, int threads);
void reverse_step(const ReverseStepParams& params, int threads);
void denoising_loss(const DenoisingLossParams& params, int threads);
void vlb_terms(const VlbTermsParams& params, int threads);
void group_norm_silu(const GroupNormSiluParams& params, int threads);
void group_norm_silu_sums(const GroupNormSiluBwdParams& params, int threads);
void group_norm_silu_bwd(const GroupNormSiluBwdParams& params, int threads);
void conv2d(const Conv2dParams& params, int threads);
void winograd_conv2d(const Conv2dParams& params, int threads);
void attention(const AttentionParams& params, int threads);

}  // namespace cpu
}  // namespace ddpm_fast
