// The CPU kernels of one instruction set on random calls, without Python, to be built under a
// sanitizer (tests/sanitize.py):
//   sanitize ROUNDS [SEED]   that many calls of each op
//   sanitize --plant KIND    an error of that kind, which the sanitizer has to report
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#include "own_threads.h"
#endif

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>

#include "network_cases.h"

namespace {

using namespace sanitize;

struct Op {
  const char* name;
  void (*run)();
};

constexpr Op kOps[] = {
    {"randn", randn_case},
    {"add_noise", add_noise_case},
    {"reverse_step", reverse_step_case},
    {"denoising_loss", denoising_loss_case},
    {"vlb_terms", vlb_terms_case},
    {"group_norm_silu", group_norm_silu_case},
    {"group_norm_silu_backward", group_norm_silu_backward_case},
    {"convolution", convolution_case},
    {"attention", attention_case},
};

void draw(void* out, int64_t elements, int threads) {
  ddpm_fast::RandnParams p{};
  p.out = out;
  p.shape = {1, 1, elements, false};
  isa::randn(p, threads);
}

int plant(const std::string& kind) {
  std::unique_ptr<float[]> block(new float[1023]);
  if (kind == "overflow") {
    draw(block.get(), 1024, 1);
  } else if (kind == "use-after-free") {
    float* freed = block.get();
    block.reset();
    draw(freed, 1023, 1);
  } else if (kind == "misaligned") {
    ddpm_fast::RandnParams p{};
    p.out = block.get();
    p.shape = {2, 1, 8, false};
    const int64_t ids[3] = {};
    p.source.sample_ids = reinterpret_cast<const int64_t*>(reinterpret_cast<const char*>(ids) + 1);
    isa::randn(p, 1);
  } else if (kind == "leak") {
    float* volatile lost = new float[1023];
    static_cast<void>(lost);
    lost = nullptr;
  } else if (kind == "race") {
    std::thread other([&] { draw(block.get(), 1023, 1); });
    draw(block.get(), 1023, 1);
    other.join();
  } else {
    std::fprintf(stderr, "no error of kind %s\n", kind.c_str());
    return 2;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--plant") return plant(argv[2]);
  if (argc < 2) return std::fprintf(stderr, "usage: sanitize ROUNDS [SEED]\n"), 2;
  const long rounds = std::atol(argv[1]);
  const unsigned long seed = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0;
  for (const Op& op : kOps) {
    for (long i = 0; i < rounds; ++i) {
      // Of each call alone, so that the one that failed can be repeated
      random_bits.seed(static_cast<unsigned>(seed + i));
      if (std::getenv("SANITIZE_VERBOSE") != nullptr) {
        std::fprintf(stderr, "%s, seed %lu\n", op.name, seed + i);
      }
      op.run();
    }
    std::printf("%s: %ld calls\n", op.name, rounds);
  }
}
