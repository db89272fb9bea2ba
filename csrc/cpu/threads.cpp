// The OpenMP runtime of the CPU kernels, and the threads that it keeps for each thread that calls.
//
// Where DDPM_FAST_FIND_OPENMP is defined (GNU's compiler on Linux) no runtime is linked: torch
// brings its own, as libgomp.so.1 or under a name with a hash by its build, and a second one would
// have threads of its own beside torch's, or not be on the machine at all. The entry points that
// the compiler calls stand here and hand on to the runtime that torch has loaded. Without any,
// every region runs on the thread that came to it.
#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(DDPM_FAST_FIND_OPENMP)
#include <dlfcn.h>

namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*barrier)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*pause_all)(int) = nullptr;  // since OpenMP 5: torch's runtime may be older

  bool complete() const { return parallel && barrier && thread_num && num_threads; }
};

template <class Function>
void look_up(void* library, const char* name, Function*& found) {
  found = reinterpret_cast<Function*>(dlsym(library, name));
}

Runtime runtime_of(void* library) {
  Runtime found;
  look_up(library, "GOMP_parallel", found.parallel);
  look_up(library, "GOMP_barrier", found.barrier);
  look_up(library, "omp_get_thread_num", found.thread_num);
  look_up(library, "omp_get_num_threads", found.num_threads);
  look_up(library, "omp_pause_resource_all", found.pause_all);
  return found;
}

// In the order in which torch's own calls are bound: what is global (preloaded, or made so by
// torch), then what its library needs. A system's runtime is for who loads this module alone.
Runtime find() {
  const Runtime global = runtime_of(RTLD_DEFAULT);
  if (global.complete()) return global;
  if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    const Runtime of_torch = runtime_of(torch);
    if (of_torch.complete()) return of_torch;
  }
  if (void* system = dlopen("libgomp.so.1", RTLD_LAZY)) {
    const Runtime of_system = runtime_of(system);
    if (of_system.complete()) return of_system;
  }
  return {};
}

const Runtime& runtime() {
  static const Runtime found = find();
  return found;
}

}  // namespace

// A construct that needs another entry point leaves an undefined symbol, which torch's runtime may
// happen to resolve where torch was imported before; tests/test_build.py finds it.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  if (runtime().complete()) {
    runtime().parallel(body, data, threads, flags);
  } else {
    body(data);
  }
}
void GOMP_barrier() {
  if (runtime().complete()) runtime().barrier();
}
int omp_get_thread_num() noexcept { return runtime().complete() ? runtime().thread_num() : 0; }
int omp_get_num_threads() noexcept { return runtime().complete() ? runtime().num_threads() : 1; }
}

namespace ddpm_fast {
namespace cpu {
namespace {
int pause_threads() {
  constexpr int kSoft = 1;  // omp_pause_soft
  return runtime().pause_all != nullptr ? runtime().pause_all(kSoft) : -1;
}
}  // namespace

bool has_threads() { return runtime().complete(); }

#else

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
// Weak: the runtime that is loaded, torch's, may be older than the compiler's.
extern "C" int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak));
#define DDPM_FAST_CAN_PAUSE 1
#endif

namespace ddpm_fast {
namespace cpu {
namespace {
int pause_threads() {
#if defined(DDPM_FAST_CAN_PAUSE)
  return omp_pause_resource_all != nullptr ? omp_pause_resource_all(omp_pause_soft) : -1;
#else
  return -1;
#endif
}
}  // namespace

bool has_threads() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

#endif

// GNU's runtime lets threads spin between two parallel regions only while no more of them exist in
// the process than processors, those of other callers' teams that sleep counted. Two teams of all
// processors: each region begins and ends with a system call (a step of a small UNet: 0.30 ms
// becomes 1.0).
bool release_threads() { return pause_threads() == 0; }

}  // namespace cpu
}  // namespace ddpm_fast
