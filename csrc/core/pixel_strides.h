// Where the pixels of a tensor [samples, rows, cols, channels] lie, its channels side by side.
#pragma once

#include <cstdint>

namespace ddpm_fast {

// From sample to sample, row to row and pixel to pixel, in elements.
struct PixelStrides {
  int64_t sample, row, pixel;
};

}  // namespace ddpm_fast
