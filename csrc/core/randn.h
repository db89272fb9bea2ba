// randn: out[n, e] = z(seed, sample n, draw, e). Writes 4 bytes an element (2 for 16-bit types).
#pragma once

#include "convert.h"
#include "noise.h"

namespace ddpm_fast {

struct RandnParams {
  void* out;
  DType dtype;
  Shape shape;
  NoiseSource source;
  DrawSource draw;
};

}  // namespace ddpm_fast
