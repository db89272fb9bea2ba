// Independent tasks shared out statically over threads, neighbours to one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "simd.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

constexpr int64_t kProductsAThread = 1 << 18;  // some 2 µs of work, what waking a thread costs

// How many of `threads` so many multiplications are worth.
inline int worth(int threads, int64_t products) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + products / kProductsAThread));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a task throws (there may be no memory for its scratch) is thrown on once all threads have
// ended, which then leave out what they have not begun: it must not leave a thread.
template <class Body>
void for_each_task(int64_t tasks, int threads, const Body& body) {
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr thrown;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) {
    if (failed.load(std::memory_order_relaxed)) continue;
    try {
      body(i);
    } catch (...) {
      if (!failed.exchange(true)) thrown = std::current_exception();
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
