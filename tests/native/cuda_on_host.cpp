// The bodies of the CUDA kernels run on the host, every lane of every tile: which body takes a
// problem, what each lane reads and writes, and every bit of the results can be tested on a machine
// that has no GPU. Tests compile this file (tests/cuda_on_host.py); it is no part of the package.
#include <pybind11/pybind11.h>

#include <string>

#include "../../csrc/arguments.h"
#include "../../csrc/cuda/add_noise.cuh"
#include "../../csrc/cuda/randn.cuh"
#include "../../csrc/cuda/reverse_step.cuh"

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
  m.def("last_body", [] { return last_body; });
  m.def("set_blocks_only", [](bool only) { blocks_only = only; });
  m.def("set_most_tiles", [](uint64_t most) { most_tiles = most; });  // the last ones
  m.def("quotient", &quotient);
}
