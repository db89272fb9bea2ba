// Winograd's F(2x2, 3x3) (Lavin & Gray 2016, section 4.1) in channels-innermost memory:
//
//   V = B^T d B for 4 x 4 pixels d of x;  M_f = V_f U_f for each of 16 places f;  y = A^T M A
//
// Tile blocks are transformed, multiplied and transformed back by one thread, in its caches.
#include <memory>

#include "kernels.h"
#include "matmul.h"
#include "tasks.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

constexpr int kPlaces = 16;
constexpr int64_t kMostTiles = 64;
constexpr int64_t kFloatsOfV = 128 * 1024;  // of the transformed inputs of a block: half of an L2

int64_t tiles_a_block(int64_t c_in) {
  const int64_t fit = kFloatsOfV / (kPlaces * c_in) / kTileRows * kTileRows;
  return std::clamp<int64_t>(fit, kTileRows, kMostTiles / kTileRows * kTileRows);
}

// Where tile i of 2 x 2 pixels lies, counted over samples.
struct Tile {
  int64_t sample, row, col;

  Tile(const WinogradConv2dParams& p, int64_t i) {
    const int64_t rows = (p.rows + 1) / 2, cols = (p.cols + 1) / 2;
    sample = i / (rows * cols);
    row = i / cols % rows * 2;
    col = i % cols * 2;
  }
  int64_t offset(const PixelStrides& s) const {
    return sample * s.sample + row * s.row + col * s.pixel;
  }
};

// V[f][tile] of one tile; `place` floats from f to f + 1.
void transform_input(const WinogradConv2dParams& p, const float* x, float* v, int64_t place) {
  for (int64_t c = 0; c < p.c_in; c += kWidth) {
    const int64_t left = p.c_in - c;
    VecF t[4][4];  // B^T d
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      VecF d[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        d[i] = load_some(x + i * p.x_strides.row + j * p.x_strides.pixel + c, left);
      }
      t[0][j] = d[0] - d[2];
      t[1][j] = d[1] + d[2];
      t[2][j] = d[2] - d[1];
      t[3][j] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = v + 4 * i * place + c;
      store_some(out, left, t[i][0] - t[i][2]);
      store_some(out + place, left, t[i][1] + t[i][2]);
      store_some(out + 2 * place, left, t[i][2] - t[i][1]);
      store_some(out + 3 * place, left, t[i][1] - t[i][3]);
    }
  }
}

// The pixels of one tile for `kWidth` channels from c on: A^T M A, the bias and the residual.
void transform_output(const WinogradConv2dParams& p, const Tile& tile, const float* m,
                      int64_t place, int64_t c) {
  VecF t[2][4];  // A^T M
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    VecF d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) d[i] = load_unaligned<VecF>(m + (4 * i + j) * place);
    t[0][j] = (d[0] + d[1]) + d[2];
    t[1][j] = (d[1] - d[2]) - d[3];
  }
  const int64_t left = p.c_out - c;
  VecF bias{};
  if (p.bias != nullptr) bias = load_some(p.bias + tile.sample * p.bias_stride + c, left);
  for (int i = 0; i < 2 && tile.row + i < p.rows; ++i) {
    const VecF pixels[2] = {(t[i][0] + t[i][1]) + t[i][2], (t[i][1] - t[i][2]) - t[i][3]};
    for (int j = 0; j < 2 && tile.col + j < p.cols; ++j) {
      VecF y = pixels[j] + bias;
      if (p.residual != nullptr) {
        const PixelStrides& s = p.residual_strides;
        y += load_some(p.residual + tile.offset(s) + i * s.row + j * s.pixel + c, left);
      }
      const PixelStrides& s = p.y_strides;
      store_some(p.y + tile.offset(s) + i * s.row + j * s.pixel + c, left, y);
    }
  }
}

// Tiles [begin, end) by blocks [first, last) of output channels.
void run(const WinogradConv2dParams& p, int64_t begin, int64_t end, int64_t first, int64_t last,
         float* v, float* m) {
  const int64_t count = end - begin, padded = round_up(count, kTileRows);
  const int64_t place = padded * p.c_in;
  for (int64_t i = 0; i < count; ++i) {
    transform_input(p, p.x + Tile(p, begin + i).offset(p.x_strides), v + i * p.c_in, place);
  }
  for (int64_t block = first; block < last; ++block) {
    const float* block_weights = p.weights + block * kPlaces * p.c_in * kConvBlock;
    for (int64_t part = 0; part < kConvBlock; part += kTileChannels) {
      const int64_t channel = block * kConvBlock + part;
      if (channel >= p.c_out) break;
      for (int64_t f = 0; f < kPlaces; ++f) {
        const float* weights = block_weights + f * p.c_in * kConvBlock + part;
        for (int64_t i = 0; i < count; i += kTileRows) {
          const float* rows[kTileRows];
          for (int r = 0; r < kTileRows; ++r) {
            rows[r] = v + f * place + std::min(i + r, count - 1) * p.c_in;
          }
          TileSums tile{};
          multiply(rows, 0, p.c_in, weights, tile);
          float* out = m + (f * padded + i) * kTileChannels;
          for (int r = 0; r < kTileRows; ++r) {
            for (int n = 0; n < kTileVectors; ++n) {
              store_unaligned(out + r * kTileChannels + n * kWidth, tile.sums[r][n]);
            }
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const Tile tile(p, begin + i);
        for (int n = 0; n < kTileVectors && channel + n * kWidth < p.c_out; ++n) {
          transform_output(p, tile, m + i * kTileChannels + n * kWidth, padded * kTileChannels,
                           channel + n * kWidth);
        }
      }
    }
  }
}

// Memory of a thread's own, kept from call to call: fresh pages cost more than the transforms.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t held = 0;
  if (held < floats) {
    memory.reset(new float[static_cast<size_t>(floats)]);
    held = floats;
  }
  return memory.get();
}

}  // namespace

void winograd_conv2d(const WinogradConv2dParams& p, int threads) {
  const int64_t tiles = p.samples * ((p.rows + 1) / 2) * ((p.cols + 1) / 2);
  const int64_t blocks = ceil_div(p.c_out, kConvBlock), size = tiles_a_block(p.c_in);
  threads = worth(threads, tiles * kPlaces * p.c_in * p.c_out);
  const int64_t ranges = ceil_div(tiles, size);
  const int64_t share = round_up(ceil_div(tiles, ranges), kTileRows);
  // Few tiles: each thread takes some of the weights and transforms the inputs for itself.
  const int64_t parts = ranges >= 2 * threads ? 1 : std::min<int64_t>(threads, blocks);
  const int64_t floats = kPlaces * size * (p.c_in + kTileChannels);
  for_each_task(ranges * parts, threads, [&](int64_t i) {
    const int64_t begin = i % ranges * share, part = i / ranges;
    if (begin >= tiles) return;
    float* v = scratch(floats);
    run(p, begin, std::min(begin + share, tiles), part * blocks / parts,
        (part + 1) * blocks / parts, v, v + kPlaces * size * p.c_in);
  });
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
