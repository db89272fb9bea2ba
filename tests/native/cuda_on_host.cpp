// The bodies of the CUDA kernels run on the host, every lane of every tile: which body takes a
// problem, what each lane reads and writes, and every bit of the results can be tested on a machine
// that has no GPU. Tests compile this file (tests/cuda_on_host.py); it is no part of the package.
#include <pybind11/pybind11.h>

#include <limits>
#include <memory>
#include <string>

#include "../../csrc/arguments.h"
#include "../../csrc/cuda/add_noise.cuh"
#include "../../csrc/cuda/denoising_loss.cuh"
#include "../../csrc/cuda/randn.cuh"
#include "../../csrc/cuda/reverse_step.cuh"
#include "../../csrc/cuda/vlb_terms.cuh"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

bool blocks_only = false;
uint64_t most_tiles = ~uint64_t{0};
std::string last_body;

template <class Body>
std::string name_of() {
  const std::string name = __PRETTY_FUNCTION__;
  const size_t begin = name.find("Body = ") + 7;
  return name.substr(begin, name.find_first_of(";]", begin) - begin);
}

// Last tile first: what a tile does must not depend on those before it.
template <class Body, class Params>
void run_all(const Params& params) {
  const cuda::Tiles tiles = cuda::tiles_of(params.shape, Body::kTile);
  last_body = name_of<Body>();
  const uint64_t first = tiles.count > most_tiles ? tiles.count - most_tiles : 0;
  for (uint64_t tile = tiles.count; tile-- > first;) {
    for (int lane = Body::kLanes; lane-- > 0;) cuda::run_tile<Body>(params, tiles, tile, lane);
  }
}

template <class Block, class Params, class Visit, class... Args>
auto on_host(Params (*make)(Args...), Visit visit) {
  return [=](Args... args) {
    const Params params = make(args...);
    if (blocks_only) return run_all<Block>(params);
    visit(params, [&](auto body) { run_all<decltype(body)>(params); });
  };
}

// The scratch memory that ddpm_fast/ops/objective.py provides, NaN.
std::unique_ptr<float[]> scratch_of(const Shape& shape, int sums) {
  const int64_t floats = shape.samples * ((shape.elements() + 127) / 128) * sums;
  std::unique_ptr<float[]> scratch(new float[floats]);
  for (int64_t i = 0; i < floats; ++i) scratch[i] = std::numeric_limits<float>::quiet_NaN();
  return scratch;
}

// Both kernels of an op that adds up: what launch_sums.cuh does, in its order of additions.
template <class Body, class Finish, class Params>
void add_up_all(Params params) {
  constexpr int kSums = Finish::kSums;
  using Sums = cuda::Sums<kSums>;
  using TotalSums = cuda::Sums<kSums, cuda::TwoFloats>;
  const cuda::Tiles tiles = cuda::tiles_of(params.shape, Body::kTile);
  const auto scratch = scratch_of(params.shape, kSums);
  params.scratch = scratch.get();
  last_body = name_of<Body>();
  for (uint64_t tile = tiles.count; tile-- > 0;) {
    Sums lanes[cuda::kWarp];
    for (int i = cuda::kWarp; i-- > 0;) lanes[i] = cuda::run_tile<Body>(params, tiles, tile, i);
    cuda::put_share(params.scratch, tile, cuda::add_lanes(lanes));
  }
  const int threads = cuda::threads_for(tiles.per_sample);
  for (int64_t n = params.shape.samples; n-- > 0;) {
    TotalSums lanes[cuda::kThreads];
    for (int i = 0; i < threads; ++i) {
      lanes[i] = cuda::add_shares<kSums>(params.scratch, n, tiles.per_sample, i, threads);
    }
    TotalSums sums = cuda::add_lanes(lanes);
    for (int i = cuda::kWarp; i < threads; i += cuda::kWarp) sums += cuda::add_lanes(lanes + i);
    Finish::run(params, n, sums);
  }
}

template <class Block, class Finish, class Scaled, class Params, class Visit, class... Args>
auto adding_up_on_host(Params (*make)(Args...), Visit visit) {
  return [=](Args... args) {
    const Params params = make(args...);
    const Scaled scaled(params);
    if (blocks_only) return add_up_all<Block, Finish>(scaled);
    visit(params, [&](auto body) { add_up_all<decltype(body), Finish>(scaled); });
  };
}

uint32_t quotient(uint32_t n, uint32_t divisor) { return cuda::divider(divisor).quotient(n); }

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("randn", on_host<cuda::RandnBlock>(randn_params, [](const auto& params, const auto& run) {
          cuda::visit_randn(params, run);
        }));
  m.def("add_noise",
        on_host<cuda::AddNoiseBlock>(add_noise_params, [](const auto& params, const auto& run) {
          cuda::visit_add_noise(params, run);
        }));
  m.def("reverse_step", on_host<cuda::ReverseStepBlock>(reverse_step_params,
                                                        [](const auto& params, const auto& run) {
                                                          cuda::visit_reverse_step(params, run);
                                                        }));
  m.def("denoising_loss", adding_up_on_host<cuda::DenoisingLossBlock, cuda::DenoisingLossFinish,
                                            cuda::ScaledDenoisingLossParams>(
                              denoising_loss_params, [](const auto& params, const auto& run) {
                                cuda::visit_denoising_loss(params, run);
                              }));
  m.def("vlb_terms",
        adding_up_on_host<cuda::VlbTermsBlock, cuda::VlbTermsFinish, cuda::ScaledVlbTermsParams>(
            vlb_terms_params,
            [](const auto& params, const auto& run) { cuda::visit_vlb_terms(params, run); }));
  m.def("last_body", [] { return last_body; });
  m.def("set_blocks_only", [](bool only) { blocks_only = only; });
  m.def("set_most_tiles", [](uint64_t most) { most_tiles = most; });  // the last ones
  m.def("quotient", &quotient);
}
