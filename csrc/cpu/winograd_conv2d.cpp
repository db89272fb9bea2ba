// Winograd's F(2x2, 3x3) (Lavin & Gray 2016, section 4.1) in channels-innermost memory:
//
//   V = B^T d B for 4 x 4 pixels d of x;  M_f = V_f U_f for each of 16 places f;  y = A^T M A
//
// Tile blocks are transformed, multiplied and transformed back by one thread, in its caches.
#include "kernels.h"
#include "matmul.h"
#include "tasks.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {
namespace {

constexpr int64_t kMostTiles = 64;
constexpr int64_t kFloatsOfV = 128 * 1024;  // of the transformed inputs of a block: half of an L2

// A tile is read from kSide x kSide pixels of x, transformed to as many places, and gives 2 x 2
// pixels of y: kSide is 4, or 3 of a doubled image, whose middle rows and columns are alike.
template <int kSide>
constexpr int64_t kPlaces = kSide * kSide;

template <int kSide>
int64_t tiles_a_block(int64_t c_in) {
  const int64_t fit = kFloatsOfV / (kPlaces<kSide> * c_in);
  return std::clamp<int64_t>(fit, kTileRows, kMostTiles) / kTileRows * kTileRows;
}

// Pixels of x from tile to tile.
template <int kSide>
constexpr int64_t kStep = kSide == 3 ? 1 : 2;

// Where tile i of 2 x 2 pixels of y lies, counted over samples.
template <int kSide>
struct Tile {
  int64_t sample, row, col;  // of tiles

  static int64_t rows(const Conv2dParams& p) { return ceil_div(p.rows, kStep<kSide>); }
  static int64_t cols(const Conv2dParams& p) { return ceil_div(p.cols, kStep<kSide>); }
  Tile(const Conv2dParams& p, int64_t i)
      : sample(i / (rows(p) * cols(p))), row(i / cols(p) % rows(p)), col(i % cols(p)) {}
  int64_t offset(const PixelStrides& s, int64_t step) const {
    return sample * s.sample + step * (row * s.row + col * s.pixel);
  }
};

// B^T d. Of a doubled image d is (d0, d1, d1, d2): the third place is zero, and the second, 2 d1,
// has its factor in the weights.
DDPM_FAST_HD void transform(const VecF (&d)[4], VecF (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}
DDPM_FAST_HD void transform(const VecF (&d)[3], VecF (&t)[3]) {
  t[0] = d[0] - d[1];
  t[1] = d[1];
  t[2] = d[1] - d[2];
}

// A^T m.
DDPM_FAST_HD void transform_back(const VecF (&m)[4], VecF (&y)[2]) {
  y[0] = (m[0] + m[1]) + m[2];
  y[1] = (m[1] - m[2]) - m[3];
}
DDPM_FAST_HD void transform_back(const VecF (&m)[3], VecF (&y)[2]) {
  y[0] = m[0] + m[1];
  y[1] = m[1] - m[2];
}

// V[f][tile] of one tile; `place` floats from f to f + 1.
template <int kSide>
void transform_input(const Conv2dParams& p, const float* x, float* v, int64_t place) {
  for (int64_t c = 0; c < p.c_in; c += kWidth) {
    const int64_t left = p.c_in - c;
    VecF columns[kSide][kSide];  // [column][row]
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      VecF d[kSide];
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        d[i] = load_some(x + i * p.x_strides.row + j * p.x_strides.pixel + c, left);
      }
      transform(d, columns[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
      VecF d[kSide], t[kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) d[j] = columns[j][i];
      transform(d, t);
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) store_some(v + (kSide * i + j) * place + c, left, t[j]);
    }
  }
}

// The pixels of one tile for `kWidth` channels from c on: A^T M A, the bias and the residual.
template <int kSide>
void transform_output(const Conv2dParams& p, const Tile<kSide>& tile, const float* m, int64_t place,
                      int64_t c) {
  VecF t[kSide][2];  // [column][row] of A^T M
#pragma GCC unroll 4
  for (int j = 0; j < kSide; ++j) {
    VecF d[kSide];
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) d[i] = load_unaligned<VecF>(m + (kSide * i + j) * place);
    transform_back(d, t[j]);
  }
  const int64_t left = p.c_out - c;
  VecF bias{};
  if (p.bias != nullptr) bias = load_some(p.bias + tile.sample * p.bias_stride + c, left);
  // Those that y has: a tile may reach past an odd side.
  const int64_t scale = 2 / kStep<kSide>;
  const int64_t rows = std::min<int64_t>(2, p.rows * scale - 2 * tile.row);
  const int64_t cols = std::min<int64_t>(2, p.cols * scale - 2 * tile.col);
  const PixelStrides &to = p.y_strides, &from = p.residual_strides;
  float* y = p.y + tile.offset(to, 2) + c;
  for (int i = 0; i < rows; ++i) {
    VecF d[kSide], pixels[2];
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) d[j] = t[j][i];
    transform_back(d, pixels);
    for (int j = 0; j < cols; ++j) {
      VecF sum = pixels[j] + bias;
      if (p.residual != nullptr) {
        const int64_t offset = tile.offset(from, 2) + i * from.row + j * from.pixel;
        sum += load_some(p.residual + offset + c, left);
      }
      store_some(y + i * to.row + j * to.pixel, left, sum);
    }
  }
}

// Tiles [begin, end) by blocks [first, last) of output channels.
template <int kSide>
void run(const Conv2dParams& p, int64_t begin, int64_t end, int64_t first, int64_t last, float* v,
         float* m) {
  const int64_t count = end - begin, padded = round_up(count, kTileRows);
  const int64_t place = padded * p.c_in;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = Tile<kSide>(p, begin + i).offset(p.x_strides, kStep<kSide>);
    transform_input<kSide>(p, p.x + offset, v + i * p.c_in, place);
  }
  for (int64_t block = first; block < last; ++block) {
    const float* block_weights = p.weights + block * kPlaces<kSide> * p.c_in * kConvBlock;
    for (int64_t part = 0; part < kConvBlock; part += kTileChannels) {
      const int64_t channel = block * kConvBlock + part;
      if (channel >= p.c_out) break;
      for (int64_t f = 0; f < kPlaces<kSide>; ++f) {
        const float* weights = block_weights + f * p.c_in * kConvBlock + part;
        for (int64_t i = 0; i < count; i += kTileRows) {
          const float* rows[kTileRows];
          for (int r = 0; r < kTileRows; ++r) {
            rows[r] = v + f * place + std::min(i + r, count - 1) * p.c_in;
          }
          TileSums tile{};
          multiply(rows, 0, 1, p.c_in, weights, kConvBlock, tile);
          float* out = m + (f * padded + i) * kTileChannels;
          for (int r = 0; r < kTileRows; ++r) {
            for (int n = 0; n < kTileVectors; ++n) {
              store_unaligned(out + r * kTileChannels + n * kWidth, tile.sums[r][n]);
            }
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const Tile<kSide> tile(p, begin + i);
        for (int n = 0; n < kTileVectors && channel + n * kWidth < p.c_out; ++n) {
          transform_output<kSide>(p, tile, m + i * kTileChannels + n * kWidth,
                                  padded * kTileChannels, channel + n * kWidth);
        }
      }
    }
  }
}

template <int kSide>
void run(const Conv2dParams& p, int threads) {
  const int64_t tiles = p.samples * Tile<kSide>::rows(p) * Tile<kSide>::cols(p);
  if (tiles == 0) return;
  const int64_t blocks = ceil_div(p.c_out, kConvBlock), size = tiles_a_block<kSide>(p.c_in);
  threads = worth(threads, tiles * kPlaces<kSide> * p.c_in * p.c_out);
  const int64_t ranges = ceil_div(tiles, size);
  const int64_t share = round_up(ceil_div(tiles, ranges), kTileRows);
  // Few tiles: each thread takes some of the weights and transforms the inputs for itself.
  const int64_t parts = ranges >= 2 * threads ? 1 : std::min<int64_t>(threads, blocks);
  const int64_t floats = kPlaces<kSide> * size * p.c_in;
  for_each_task(ranges * parts, threads, [&](int64_t i) {
    const int64_t begin = i % ranges * share, part = i / ranges;
    if (begin >= tiles) return;
    float* v = thread_memory(floats + kPlaces<kSide> * size * kTileChannels);
    run<kSide>(p, begin, std::min(begin + share, tiles), part * blocks / parts,
               (part + 1) * blocks / parts, v, v + floats);
  });
}

}  // namespace

void winograd_conv2d(const Conv2dParams& p, int threads) {
  p.phases == 4 ? run<3>(p, threads) : run<4>(p, threads);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
