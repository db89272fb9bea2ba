// Attention of one block of queries at a time: its scores with all keys, a softmax down their
// columns, and the sum of all values, each row of the two products in a thread's first caches.
#include <cmath>

#include "../core/exp.h"
#include "kernels.h"
#include "matmul.h"
#include "tasks.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

constexpr int64_t kQueries = kConvBlock;  // of a block, side by side in `scores`

// The memory of a task: queries [depth, kQueries], scores [pixels, kQueries], and the values'
// last channels [pixels, kConvBlock] where they fill no block.
struct Memory {
  float *queries, *scores, *values;

  static int64_t floats(const AttentionParams& p) {
    return (p.depth + p.pixels * (p.depth % kConvBlock != 0 ? 2 : 1)) * kConvBlock;
  }
  Memory(const AttentionParams& p, float* memory)
      : queries(memory),
        scores(memory + p.depth * kQueries),
        values(scores + p.pixels * kQueries) {}
};

// scores[k][i] = q_i k_k / sqrt(depth), i counting the block's queries.
void score(const AttentionParams& p, const float* keys, const Memory& memory) {
  for (int64_t k = 0; k < p.pixels; k += kTileRows) {
    const float* rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = keys + std::min(k + r, p.pixels - 1) * p.qkv_strides.pixel;
    }
    for (int64_t part = 0; part < kQueries; part += kTileChannels) {
      TileSums tile{};
      multiply(rows, 0, 1, p.depth, memory.queries + part, kQueries, tile);
      for (int r = 0; r < kTileRows && k + r < p.pixels; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
          store_unaligned(memory.scores + (k + r) * kQueries + part + v * kWidth, tile.sums[r][v]);
        }
      }
    }
  }
}

// Each column of scores becomes exp(score - its greatest); their sums' reciprocals in `scales`.
void exponentiate(const AttentionParams& p, float* scores, float* scales) {
  for (int64_t column = 0; column < kQueries; column += kWidth) {
    VecF most = load_unaligned<VecF>(scores + column);
    for (int64_t k = 1; k < p.pixels; ++k) {
      most = Lanes::at_least(load_unaligned<VecF>(scores + k * kQueries + column), most);
    }
    VecF sum{};
    for (int64_t first = 0; first < p.pixels; first += kChain) {
      VecF chain{};
      for (int64_t k = first; k < std::min(first + kChain, p.pixels); ++k) {
        float* at = scores + k * kQueries + column;
        const VecF e = exp_clamped<Lanes>(load_unaligned<VecF>(at) - most);
        chain += e;
        store_unaligned(at, e);
      }
      sum += chain;
    }
    store_unaligned(scales + column, Lanes::splat(1.0f) / sum);
  }
}

// y of queries [first, first + count).
void weigh(const AttentionParams& p, const float* values, float* y, int64_t count,
           const Memory& memory, const float* scales) {
  for (int64_t channel = 0; channel < p.depth; channel += kConvBlock) {
    const float* block = values + channel;
    int64_t stride = p.qkv_strides.pixel;
    const int64_t left = p.depth - channel;
    if (left < kConvBlock) {
      for (int64_t k = 0; k < p.pixels; ++k) {
        for (int64_t c = 0; c < kConvBlock; ++c) {
          memory.values[k * kConvBlock + c] = c < left ? block[k * stride + c] : 0.0f;
        }
      }
      block = memory.values;
      stride = kConvBlock;
    }
    for (int64_t part = 0; part < std::min(kConvBlock, left); part += kTileChannels) {
      for (int64_t i = 0; i < count; i += kTileRows) {
        const float* rows[kTileRows];
        for (int r = 0; r < kTileRows; ++r) rows[r] = memory.scores + std::min(i + r, count - 1);
        TileSums tile{};
        multiply(rows, 0, kQueries, p.pixels, block + part, stride, tile);
        for (int r = 0; r < kTileRows && i + r < count; ++r) {
          for (int v = 0; v < kTileVectors; ++v) {
            const int64_t c = channel + part + v * kWidth;
            if (c >= p.depth) break;
            store_some(y + (i + r) * p.y_strides.pixel + c, p.depth - c,
                       tile.sums[r][v] * Lanes::splat(scales[i + r]));
          }
        }
      }
    }
  }
}

}  // namespace

void attention(const AttentionParams& p, int threads) {
  const int64_t blocks = ceil_div(p.pixels, kQueries), channels = p.heads * p.depth;
  threads = worth(threads, 2 * p.samples * p.pixels * p.pixels * channels);
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.depth));
  for_each_task(p.samples * p.heads * blocks, threads, [&](int64_t i) {
    const int64_t sample = i / blocks / p.heads, head = i / blocks % p.heads;
    const int64_t first = i % blocks * kQueries, count = std::min(kQueries, p.pixels - first);
    const Memory memory(p, thread_memory(Memory::floats(p)));
    const float* queries = p.qkv + sample * p.qkv_strides.sample + head * p.depth;
    for (int64_t c = 0; c < p.depth; ++c) {
      for (int64_t q = 0; q < kQueries; ++q) {
        const float* of = queries + (first + std::min(q, count - 1)) * p.qkv_strides.pixel;
        memory.queries[c * kQueries + q] = of[c] * scale;
      }
    }
    float scales[kQueries];
    score(p, queries + channels, memory);
    exponentiate(p, memory.scores, scales);
    float* y = p.y + sample * p.y_strides.sample + first * p.y_strides.pixel + head * p.depth;
    weigh(p, queries + 2 * channels, y, count, memory, scales);
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
