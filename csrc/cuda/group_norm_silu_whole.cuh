// group_norm_silu in one kernel, where a block's registers hold whole groups: x is read once. Moves
// x and y; with a residual, x, residual, s and y.
#pragma once

#include "group_norm_silu.cuh"

namespace ddpm_fast {
namespace cuda {

template <class Layout_>
struct GroupNormSiluWhole {
  using Layout = Layout_;
  using Moments = GroupNormSiluMoments<Layout>;
  using Apply = GroupNormSiluApply<Layout>;
  using Part = typename Moments::Part;
  static constexpr int kChannels = Layout::kChannels;
  static constexpr int kRounds = 2, kHeld = kRounds * kInFlight;  // vectors of a thread
  static constexpr int kMostWarps = 16, kMostLanes = 8, kMostChannels = 128;

  // What a thread has of s.
  struct Held {
    InFlight<Layout> s[kRounds];
  };
  // What a block's threads tell each other, of each channel.
  struct alignas(16) Shared {
    float moments[2 * kMostChannels], affine[3 * kMostChannels];
  };

  // Tiles of whole groups and all pixels; without a count where a block cannot hold them. Which it
  // can is a function of the shape alone. In channels_last groups that lie side by side share a
  // tile until a pixel's part is whole vectors and a sector of 32 bytes; elsewhere until 4 warps
  // are at work.
  static GroupTiles tiles(const GroupNormShape& shape) {
    GroupTiles tiles{};
    const bool last = tiles.channels_last = Layout::channels_last(false);
    const int64_t group = shape.group_channels(), pixels = shape.pixels();
    int64_t groups = 1;  // of a tile
    if (last) {
      while (groups < shape.groups &&
             (groups * group % kChannels != 0 || groups * group < 2 * kChannels)) {
        ++groups;
      }
      if (groups * group % kChannels != 0) return tiles;
      tiles.bits = log2_up(groups * group / kChannels);
      tiles.warps = static_cast<int>(((pixels + kHeld - 1) / kHeld * (1 << tiles.bits) + 31) / 32);
      if (1 << tiles.bits > kMostLanes) return tiles;
    } else {
      const int lanes = log2_up((pixels + kHeld * Layout::kPixels - 1) / (kHeld * Layout::kPixels));
      if (lanes > 5) return tiles;
      tiles.bits = 5 - lanes;
      groups =
          std::max<int64_t>(1, std::min((int64_t{kWarps} << tiles.bits) / group, shape.groups));
      const int64_t warps = (groups * group + (1 << tiles.bits) - 1) >> tiles.bits;
      tiles.warps = static_cast<int>(std::min<int64_t>(warps, kMostWarps + 1));
    }
    if (tiles.warps > kMostWarps || groups * group > kMostChannels) return tiles;
    tiles.of_tile = static_cast<uint32_t>(groups * group);
    cut(shape, pixels, tiles);
    return tiles;
  }

  static DDPM_FAST_HD Part read(const GroupNormSiluParams& p, const GroupTiles& tiles,
                                uint32_t tile, int thread, Held& held) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    Part moments{};
    if (!lane.inside) return moments;
    const TensorStrides strides = strides_in(p.shape, p.x_strides);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kRounds; ++i) {
      held.s[i].load(p.x, p.dtype, strides, tiles, lane, pixel_of(lane, i));
    }
    DDPM_FAST_UNROLL
    for (int i = 0; i < kRounds; ++i) {
      const uint32_t pixel = pixel_of(lane, i);
      if (pixel >= lane.end) continue;
      if (p.residual != nullptr) Moments::add_residual(p, tiles, lane, pixel, held.s[i]);
      moments += Moments::of_vectors(p.dtype, lane, pixel, held.s[i]);
    }
    return moments;
  }

  // Of the threads that lead.
  static DDPM_FAST_HD void tell(const GroupTiles& tiles, uint32_t tile, int thread,
                                const Part& moments, Shared& shared) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    if (!lane.leads) return;
    float* to = shared.moments + 2 * (lane.in_tile);
    DDPM_FAST_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      to[2 * k] = moments.mean[k], to[2 * k + 1] = moments.squares[k];
    }
  }

  // Groups of a tile, the last of a sample's shorter; a warp takes every so many.
  static DDPM_FAST_HD uint32_t groups_of(const GroupTiles& tiles, uint32_t tile) {
    const uint32_t of_channel = tile - tiles.by_channels.quotient(tile) * tiles.of_channels;
    const uint32_t left = tiles.channels - of_channel * tiles.of_tile;
    return tiles.by_group.quotient(left < tiles.of_tile ? left : tiles.of_tile);
  }
  static DDPM_FAST_HD GroupOfThreads place(const GroupTiles& tiles, uint32_t tile, uint32_t group,
                                           int lane, Shared& shared) {
    const uint32_t n = tiles.by_channels.quotient(tile), of_channel = tile - n * tiles.of_channels;
    const uint32_t channel = group * tiles.group, of_tile = tiles.by_group.quotient(tiles.of_tile);
    return {n,
            of_channel * of_tile + group,
            tiles.group,
            shared.moments + 2 * channel,
            0,
            1,
            tiles.pixels,
            shared.affine + channel,
            kMostChannels,
            tiles.by_group,
            lane,
            kWarp};
  }

  static DDPM_FAST_HD void write(const GroupNormSiluParams& p, const GroupTiles& tiles,
                                 uint32_t tile, int thread, const Held& held,
                                 const Shared& shared) {
    const GroupLane<Layout> lane(tiles, tile, thread);
    if (!lane.inside) return;
    const typename Apply::Affine affine(shared.affine + lane.in_tile, kMostChannels);
    DDPM_FAST_UNROLL
    for (int i = 0; i < kRounds; ++i) {
      Apply::put(p, tiles, lane, pixel_of(lane, i), affine, held.s[i]);
    }
  }

 private:
  static DDPM_FAST_HD uint32_t pixel_of(const GroupLane<Layout>& lane, int round) {
    return lane.first + round * kInFlight * lane.step;
  }
};

}  // namespace cuda
}  // namespace ddpm_fast
