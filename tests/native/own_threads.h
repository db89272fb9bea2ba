// The few functions of OpenMP's runtime that the kernels use, on std::thread: ThreadSanitizer knows
// nothing of the futexes that libgomp waits by, and would call every use of another thread's memory
// a race. To be compiled with -fopenmp and linked without it.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace own_threads {

struct Team {
  explicit Team(unsigned size) : size(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned round = rounds;
    if (++waiting == size) {
      waiting = 0;
      ++rounds;
      all.notify_all();
      return;
    }
    all.wait(lock, [&] { return rounds != round; });
  }

  const unsigned size;
  unsigned waiting = 0, rounds = 0;
  std::mutex mutex;
  std::condition_variable all;
};

inline thread_local Team* team = nullptr;
inline thread_local int index = 0;

}  // namespace own_threads

extern "C" {

int omp_get_thread_num() { return own_threads::index; }
int omp_get_num_threads() {
  return own_threads::team == nullptr ? 1 : static_cast<int>(own_threads::team->size);
}
void GOMP_barrier() {
  if (own_threads::team != nullptr) own_threads::team->wait();
}
void GOMP_parallel(void (*body)(void*), void* data, unsigned size, unsigned) {
  own_threads::Team team(size);
  const auto member = [&](unsigned i) {
    own_threads::team = &team;
    own_threads::index = static_cast<int>(i);
    body(data);
    own_threads::team = nullptr;
    own_threads::index = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < size; ++i) others.emplace_back(member, i);
  member(0);
  for (std::thread& thread : others) thread.join();
}

}  // extern "C"
