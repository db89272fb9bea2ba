// A model's output, or its gradient: as many channels as x_0 has, or twice as many, the second half
// of which tells of the variance. Read and written a granule at a time, as granule.h does.
#pragma once

#include "granule.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <class Base>  // void or const void
class Halves {
 public:
  Halves(Base* base, DType dtype, const Shape& shape, bool doubled)
      : base_(base), dtype_(dtype), shape_(shape), doubled_(doubled) {}

  // Elements [i, i + n) of a sample's half, in x_0's memory order.
  const float* load_half(int half, int64_t sample, int64_t i, int n, float* buffer) const {
    if (!scattered()) return load(base_, dtype_, offset(half, sample, i), n, buffer);
    for_each(half, sample, i, n, [&](int64_t at, int j) { buffer[j] = value_at(at); });
    for (int j = n; j < kGranule; ++j) buffer[j] = 0.0f;
    return buffer;
  }

  // Where a granule of results goes first, and from there into memory.
  float* target_half(int half, int64_t sample, int64_t i, int n, float* buffer) const {
    if (scattered()) return buffer;
    return target(base_, dtype_, offset(half, sample, i), n, buffer);
  }
  void commit_half(int half, int64_t sample, int64_t i, int n, const float* values) const {
    if (!scattered()) return commit(base_, dtype_, offset(half, sample, i), n, values);
    if (dtype_ == DType::kFloat32) {
      for_each(half, sample, i, n,
               [&](int64_t at, int j) { static_cast<float*>(base_)[at] = values[j]; });
      return;
    }
    alignas(64) uint16_t narrowed[kGranule];
    narrow(values, dtype_, narrowed);
    for_each(half, sample, i, n,
             [&](int64_t at, int j) { static_cast<uint16_t*>(base_)[at] = narrowed[j]; });
  }

 private:
  // In channels_last a pixel's two halves lie side by side.
  bool scattered() const { return doubled_ && shape_.channels_last; }

  int64_t offset(int half, int64_t sample, int64_t i) const {
    const int64_t elements = shape_.elements();
    return doubled_ ? (2 * sample + half) * elements + i : sample * elements + i;
  }

  template <class Visit>
  void for_each(int half, int64_t sample, int64_t i, int n, const Visit& visit) const {
    const int64_t channels = shape_.channels, start = sample * 2 * shape_.elements();
    int64_t pixel = i / channels, c = i % channels;
    for (int j = 0; j < n; ++j) {
      visit(start + (2 * pixel + half) * channels + c, j);
      if (++c == channels) c = 0, ++pixel;
    }
  }

  float value_at(int64_t i) const {
    switch (dtype_) {
      case DType::kBFloat16: return float_from_bf16<ScalarLanes>(*at<uint16_t>(base_, i));
      case DType::kFloat16: return float_from_half(*at<uint16_t>(base_, i));
      default: return *at<float>(base_, i);
    }
  }

  Base* base_;
  DType dtype_;
  const Shape& shape_;
  bool doubled_;
};

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
