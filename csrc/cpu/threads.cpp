// The threads that OpenMP keeps for each thread that calls it.
#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
// Weak: the runtime that is loaded, torch's, may be older than the compiler's.
extern "C" int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak));
#define DDPM_FAST_CAN_PAUSE 1
#endif

namespace ddpm_fast {
namespace cpu {

// GNU's runtime lets threads spin between two parallel regions only while no more of them exist in
// the process than processors, those of other callers' teams that sleep counted. Two teams of all
// processors: each region begins and ends with a system call (a step of a small UNet: 0.30 ms
// becomes 1.0).
bool release_threads() {
#if defined(DDPM_FAST_CAN_PAUSE)
  return omp_pause_resource_all != nullptr && omp_pause_resource_all(omp_pause_soft) == 0;
#else
  return false;
#endif
}

}  // namespace cpu
}  // namespace ddpm_fast
