// What every op that draws noise is told: whose noise, and how a sample's elements lie in memory.
#pragma once

#include "philox.h"

namespace ddpm_fast {

// [samples, channels, pixels] in memory order, or [samples, pixels, channels] where channels_last
// (which is said only of what is not contiguous as well).
// An element's noise index is channel * pixels + pixel in both.
struct Shape {
  int64_t samples;
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  DDPM_FAST_HD int64_t elements() const { return channels * pixels; }
};

struct NoiseSource {
  uint64_t seed;
  const int64_t* seeds;       // [samples] or null: one seed for all
  const int64_t* sample_ids;  // [samples] or null: 0 .. samples - 1

  DDPM_FAST_HD NoiseKey key(int64_t sample, uint32_t draw) const {
    return {seeds != nullptr ? static_cast<uint64_t>(seeds[sample]) : seed,
            static_cast<uint64_t>(sample_ids != nullptr ? sample_ids[sample] : sample), draw};
  }
};

DDPM_FAST_HD uint32_t draw_of(uint32_t stream, int64_t index) {
  return stream << 24 | static_cast<uint32_t>(index);
}

// Which draw of each sample.
struct DrawSource {
  uint32_t stream;
  int64_t index;           // one for all samples, or
  const int64_t* indices;  // [samples]: of those that lie on a device the low 24 bits count

  DDPM_FAST_HD uint32_t draw(int64_t sample) const {
    return draw_of(stream, indices != nullptr ? indices[sample] & 0xFFFFFF : index);
  }
};

constexpr uint32_t kStreamReverseStep = 1;

}  // namespace ddpm_fast
