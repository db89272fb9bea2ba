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
#include "../../csrc/cuda/group_norm_silu_bwd.cuh"
#include "../../csrc/cuda/group_norm_silu_whole.cuh"
#include "../../csrc/cuda/randn.cuh"
#include "../../csrc/cuda/reverse_step.cuh"
#include "../../csrc/cuda/vlb_terms.cuh"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

bool blocks_only = false, chunks_only = false;
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

// group_norm_silu's tiles, last first, as group_norm_silu_launch.cuh runs them.
template <class Body, class Params>
void run_group_tiles(const Params& p, const cuda::GroupTiles& tiles) {
  for (uint64_t tile = tiles.count; tile-- > 0;) {
    for (int thread = cuda::kThreads; thread-- > 0;) Body::run(p, tiles, tile, thread);
  }
}

template <class Body, class Params>
void run_group_parts(const Params& p, const cuda::GroupTiles& tiles) {
  for (uint64_t tile = tiles.count; tile-- > 0;) {
    typename Body::Part parts[cuda::kThreads];
    for (int i = cuda::kThreads; i-- > 0;) parts[i] = Body::run(p, tiles, tile, i);
    cuda::add_threads<typename Body::Layout>(tiles, parts);
    for (int i = cuda::kThreads; i-- > 0;) Body::put(p, tiles, tile, i, parts[i]);
  }
}

// visit, or where blocks_only says so the layout that takes any problem.
template <class Params, class Visit, class Run>
void visit_groups(const Params& p, const Visit& visit, const Run& run) {
  const auto named = [&](auto layout) {
    last_body = name_of<decltype(layout)>();
    run(layout);
  };
  if (blocks_only) return named(cuda::Singles{});
  visit(p, named);
}

// at(i): the place of the i-th thread of those that take a group.
template <class Place>
void finish_group(const GroupNormSiluParams& p, int threads, const Place& at) {
  using Finish = cuda::GroupNormSiluFinish<1>;
  cuda::Sums<1> first[cuda::kThreads];
  cuda::Sums<2> second[cuda::kThreads];
  for (int i = threads; i-- > 0;) first[i] = Finish::sum(p, at(i));
  const float about = Finish::mean(p, at(0), cuda::add_block(first, threads));
  for (int i = threads; i-- > 0;) second[i] = Finish::sums_about(p, at(i), about);
  const cuda::Sums<2> sums = cuda::add_block(second, threads);
  for (int i = threads; i-- > 0;) Finish::put(p, at(i), about, sums);
}

template <class Body>
void run_whole_groups(const GroupNormSiluParams& p, const cuda::GroupTiles& tiles) {
  last_body = name_of<Body>();
  const int threads = cuda::kWarp * tiles.warps;
  for (uint64_t tile = tiles.count; tile-- > 0;) {
    typename Body::Held held[cuda::kWarp * Body::kMostWarps];
    typename Body::Part parts[cuda::kWarp * Body::kMostWarps];
    typename Body::Shared shared;
    for (float& x : shared.moments) x = std::numeric_limits<float>::quiet_NaN();
    for (float& x : shared.affine) x = std::numeric_limits<float>::quiet_NaN();
    for (int i = threads; i-- > 0;) parts[i] = Body::read(p, tiles, tile, i, held[i]);
    cuda::add_threads<typename Body::Layout>(tiles, parts);
    for (int i = threads; i-- > 0;) Body::tell(tiles, tile, i, parts[i], shared);
    for (uint32_t group = Body::groups_of(tiles, tile); group-- > 0;) {
      finish_group(p, cuda::kWarp,
                   [&](int lane) { return Body::place(tiles, tile, group, lane, shared); });
    }
    for (int i = threads; i-- > 0;) Body::write(p, tiles, tile, i, held[i], shared);
  }
}

template <class... Args>
auto group_norm_on_host(GroupNormSiluParams (*make)(Args...)) {
  return [=](Args... args) {
    const GroupNormSiluParams p = make(args...);
    const auto visit = [](const auto& q, const auto& run) { cuda::visit_group_norm_silu(q, run); };
    visit_groups(p, visit, [&](auto layout) {
      using Layout = decltype(layout);
      using Finish = cuda::GroupNormSiluFinish<1>;
      if constexpr (Layout::kElements > 1) {
        using Whole = cuda::GroupNormSiluWhole<Layout>;
        const cuda::GroupTiles tiles = Whole::tiles(p.shape);
        if (tiles.count > 0 && !chunks_only) return run_whole_groups<Whole>(p, tiles);
      }
      run_group_parts<cuda::GroupNormSiluMoments<Layout>>(
          p, cuda::group_tiles<Layout>(p.shape, p.chunk));
      const int64_t channels = p.shape.group_channels();
      const cuda::Divider by_channels = cuda::divider(channels);
      const int threads = cuda::threads_for(p.chunks * channels);
      for (int64_t block = p.shape.samples * p.shape.groups; block-- > 0;) {
        finish_group(p, threads, [&](int i) {
          return Finish::place(p, channels, by_channels, block, i, threads);
        });
      }
      run_group_tiles<cuda::GroupNormSiluApply<Layout>>(p, cuda::group_tiles<Layout>(p.shape, 0));
    });
  };
}

template <class Run, class... Args>
auto group_norm_bwd_on_host(GroupNormSiluBwdParams (*make)(Args...), const Run& run) {
  return [=](Args... args) {
    const GroupNormSiluBwdParams p = make(args...);
    const auto visit = [](const auto& q, const auto& visitor) {
      cuda::visit_group_norm_silu_bwd(q, visitor);
    };
    visit_groups(p, visit, [&](auto layout) { run(p, layout); });
  };
}

template <class Layout>
void group_norm_sums(const GroupNormSiluBwdParams& p, Layout) {
  using Finish = cuda::GroupNormSiluSumsFinish;
  const cuda::GroupTiles tiles = cuda::group_tiles<Layout>(p.shape, p.chunk);
  run_group_parts<cuda::GroupNormSiluSums<Layout>>(p, tiles);
  if (tiles.chunks == 1) return;
  const int64_t of_sample = Finish::sums_of_sample(p);
  for (int64_t n = p.shape.samples; n-- > 0;) {
    for (int64_t i = (of_sample + cuda::kWarp - 1) / cuda::kWarp * cuda::kWarp; i-- > 0;) {
      cuda::Sums<1> sum = Finish::run(p, n, i, 0);
      for (int warp = 1; warp < cuda::kWarps; ++warp) sum += Finish::run(p, n, i, warp);
      Finish::put(p, n, i, sum);
    }
  }
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
  m.def("group_norm_silu", group_norm_on_host(group_norm_silu_params));
  m.def("group_norm_silu_sums",
        group_norm_bwd_on_host(group_norm_silu_bwd_params,
                               [](const auto& p, auto layout) { group_norm_sums(p, layout); }));
  m.def("group_norm_silu_bwd",
        group_norm_bwd_on_host(group_norm_silu_bwd_params, [](const auto& p, auto layout) {
          using Layout = decltype(layout);
          run_group_tiles<cuda::GroupNormSiluBwd<Layout>>(p, cuda::group_tiles<Layout>(p.shape, 0));
        }));
  m.def("last_body", [] { return last_body; });
  m.def("set_blocks_only", [](bool only) { blocks_only = only; });
  m.def("set_chunks_only", [](bool only) { chunks_only = only; });
  m.def("set_most_tiles", [](uint64_t most) { most_tiles = most; });  // the last ones
  m.def("quotient", &quotient);
}
