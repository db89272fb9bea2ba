// The noise of one tile. Formula and bytes moved: core/randn.h.
#pragma once

#include "../core/randn.h"
#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

DDPM_FAST_HD NoiseKey key_of(const RandnParams& p, int64_t n) {
  return p.source.key(n, p.draw.draw(n));
}

template <class Out, class Layout>
struct RandnTile {
  static constexpr int kLanes = kWarp;
  static constexpr int kTile = kWarp * Layout::kElements;
  static constexpr int kMinBlocks = 8;

  static DDPM_FAST_HD void run(const RandnParams& p, const Tiles& tiles, uint32_t n, uint32_t tile,
                               int lane) {
    float z[Layout::kElements];
    Layout::draw(key_of(p, n), p.shape, tile, lane, z);
    Lane<Layout>(tiles, n, tile, lane).template store<Out>(p.out, z);
  }
};

struct RandnBlock {
  static constexpr int kLanes = 1;
  static constexpr int kTile = 4;
  static constexpr int kMinBlocks = 1;

  static DDPM_FAST_HD void run(const RandnParams& p, const Tiles& tiles, int64_t n, int64_t block) {
    Block at(p.shape, block);
    float z[4];
    draw_block(key_of(p, n), static_cast<uint32_t>(block), z);
    DDPM_FAST_UNROLL
    for (int j = 0; j < 4; ++j, at.next()) {
      if (j < at.count) put(p.out, p.dtype, n * tiles.elements + at.offset(), z[j]);
    }
  }
};

// visit(body) for the body that takes this problem.
template <class Visit>
void visit_randn(const RandnParams& p, const Visit& visit) {
  const bool whole = is_regular(p.shape) && aligned(p.out);
  const auto of_type = [&](auto out) {
    using Out = decltype(out);
    return whole && visit_layout<vector_of<Out>()>(
                        p.shape, [&](auto layout) { visit(RandnTile<Out, decltype(layout)>{}); });
  };
  bool found = false;
  if (p.dtype == DType::kFloat32) found = of_type(Float32{});
  if (p.dtype == DType::kBFloat16) found = of_type(BFloat16{});
  if (p.dtype == DType::kFloat16) found = of_type(Float16{});
  if (!found) visit(RandnBlock{});
}

}  // namespace cuda
}  // namespace ddpm_fast
