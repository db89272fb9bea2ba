// Picks the widest instruction set that this processor and its operating system offer.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace ddpm_fast {
namespace cpu {
namespace {

struct KernelSet {
  const char* isa;
  bool supported;
  void (*randn)(const RandnParams&, int);
  void (*add_noise)(const AddNoiseParams&, int);
  void (*reverse_step)(const ReverseStepParams&, int);
  void (*denoising_loss)(const DenoisingLossParams&, int);
  void (*vlb_terms)(const VlbTermsParams&, int);
  void (*group_norm_silu)(const GroupNormSiluParams&, int);
  void (*group_norm_silu_sums)(const GroupNormSiluBwdParams&, int);
  void (*group_norm_silu_bwd)(const GroupNormSiluBwdParams&, int);
  void (*conv2d)(const Conv2dParams&, int);
  void (*winograd_conv2d)(const Conv2dParams&, int);
  void (*attention)(const AttentionParams&, int);
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define DDPM_FAST_KERNEL_SET(isa, supported) \
  {#isa,                                     \
   supported,                                \
   isa::randn,                               \
   isa::add_noise,                           \
   isa::reverse_step,                        \
   isa::denoising_loss,                      \
   isa::vlb_terms,                           \
   isa::group_norm_silu,                     \
   isa::group_norm_silu_sums,                \
   isa::group_norm_silu_bwd,                 \
   isa::conv2d,                              \
   isa::winograd_conv2d,                     \
   isa::attention}

// Widest first.
const KernelSet kSets[] = {
#if defined(__x86_64__)
    DDPM_FAST_KERNEL_SET(avx512, has_avx512()),
    DDPM_FAST_KERNEL_SET(avx2, has_avx2()),
#endif
    DDPM_FAST_KERNEL_SET(portable, true),
};

const KernelSet* find(const char* name) {
  for (const KernelSet& set : kSets) {
    if (set.supported && (name == nullptr || std::strcmp(set.isa, name) == 0)) return &set;
  }
  return nullptr;
}

std::atomic<const KernelSet*> current{find(nullptr)};

}  // namespace

const char* isa() { return current.load()->isa; }
bool isa_supported(const char* name) { return find(name) != nullptr; }
void set_isa(const char* name) { current = find(name); }

void randn(const RandnParams& params, int threads) { current.load()->randn(params, threads); }
void add_noise(const AddNoiseParams& params, int threads) {
  current.load()->add_noise(params, threads);
}
void reverse_step(const ReverseStepParams& params, int threads) {
  current.load()->reverse_step(params, threads);
}
void denoising_loss(const DenoisingLossParams& params, int threads) {
  current.load()->denoising_loss(params, threads);
}
void vlb_terms(const VlbTermsParams& params, int threads) {
  current.load()->vlb_terms(params, threads);
}
void group_norm_silu(const GroupNormSiluParams& params, int threads) {
  current.load()->group_norm_silu(params, threads);
}
void group_norm_silu_sums(const GroupNormSiluBwdParams& params, int threads) {
  current.load()->group_norm_silu_sums(params, threads);
}
void group_norm_silu_bwd(const GroupNormSiluBwdParams& params, int threads) {
  current.load()->group_norm_silu_bwd(params, threads);
}
void conv2d(const Conv2dParams& params, int threads) { current.load()->conv2d(params, threads); }
void winograd_conv2d(const Conv2dParams& params, int threads) {
  current.load()->winograd_conv2d(params, threads);
}
void attention(const AttentionParams& params, int threads) {
  current.load()->attention(params, threads);
}

}  // namespace cpu
}  // namespace ddpm_fast
