// A model's output with twice the channels of x_0, the second half of which tells of the variance,
// or its gradient. In channels_last a pixel's two halves lie side by side.
#pragma once

#include "tile.cuh"

namespace ddpm_fast {
namespace cuda {

// The lane's elements of both halves as they lie in a channels_last tensor.
template <class Layout>
struct Interleaved {
  static constexpr int kElements = Layout::kElements;
  float values[2 * kElements];

  // Of the i-th element in a half.
  static DDPM_FAST_HD int place(int half, int i) {
    constexpr int kChannels = Layout::kChannels;
    return i / kChannels * 2 * kChannels + i % kChannels + half * kChannels;
  }
  template <class M>
  DDPM_FAST_HD void load(const void* base, const Lane<Layout>& at) {
#if !defined(__CUDA_ARCH__)
    std::memset(values, 0, sizeof values);
#endif
    if (at.left <= 0) return;
    DDPM_FAST_UNROLL
    for (int i = 0; i < 2 * kElements; i += Layout::kVector) {
      cuda::load<M, Layout::kVector>(element(base, 2 * at.first + i, M::kSize), values + i);
    }
  }
  template <class M>
  DDPM_FAST_HD void store(void* base, const Lane<Layout>& at) const {
    if (at.left <= 0) return;
    DDPM_FAST_UNROLL
    for (int i = 0; i < 2 * kElements; i += Layout::kVector) {
      cuda::store<M, Layout::kVector>(element(base, 2 * at.first + i, M::kSize), values + i);
    }
  }
  DDPM_FAST_HD void half(int half, float (&out)[kElements]) const {
    DDPM_FAST_UNROLL
    for (int i = 0; i < kElements; ++i) out[i] = values[place(half, i)];
  }
};

// The lane's part of one half of a model's output; of the whole where it has but one.
template <class M, class Layout>
DDPM_FAST_HD void load_half(const void* base, bool doubled, int half, const Lane<Layout>& at,
                            float (&out)[Layout::kElements]) {
  if (!doubled) return at.template load<M>(base, out);
  if constexpr (Layout::kChannels == 0) {
    at.template load<M>(element(base, at.sample + half * at.elements, M::kSize), out);
  } else {
    Interleaved<Layout> both;
    both.template load<M>(base, at);
    both.half(half, out);
  }
}

template <class M, class Layout>
DDPM_FAST_HD void load_halves(const void* base, const Lane<Layout>& at,
                              float (&first)[Layout::kElements],
                              float (&second)[Layout::kElements]) {
  if constexpr (Layout::kChannels == 0) {
    load_half<M>(base, true, 0, at, first);
    load_half<M>(base, true, 1, at, second);
  } else {
    Interleaved<Layout> both;
    both.template load<M>(base, at);
    both.half(0, first);
    both.half(1, second);
  }
}

template <class M, class Layout>
DDPM_FAST_HD void store_halves(void* base, const Lane<Layout>& at,
                               const float (&first)[Layout::kElements],
                               const float (&second)[Layout::kElements]) {
  if constexpr (Layout::kChannels == 0) {
    at.template store<M>(element(base, at.sample, M::kSize), first);
    at.template store<M>(element(base, at.sample + at.elements, M::kSize), second);
  } else {
    Interleaved<Layout> both;
    DDPM_FAST_UNROLL
    for (int i = 0; i < Layout::kElements; ++i) {
      both.values[both.place(0, i)] = first[i];
      both.values[both.place(1, i)] = second[i];
    }
    both.template store<M>(base, at);
  }
}

// Where element `at` of sample n lies in one half of a model's output, or in the whole.
DDPM_FAST_HD int64_t place_in_half(const Block& at, bool doubled, int half, int64_t n,
                                   int64_t elements) {
  return doubled ? 2 * n * elements + at.offset_in_half(half) : n * elements + at.offset();
}

}  // namespace cuda
}  // namespace ddpm_fast
