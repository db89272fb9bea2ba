// What the tiles of the training objective's ops share: x_0 in [-1, 1] of any type, and eps.
#pragma once

#include "../core/add_noise.h"
#include "halves.cuh"
#include "sums.cuh"

namespace ddpm_fast {
namespace cuda {

// A lane's elements of a tensor whose type is known only when the kernel runs, as they lie in
// memory: nothing waits for the loads until the values are asked for.
template <class Layout>
struct Fetched {
  static constexpr int kElements = Layout::kElements, kVector = Layout::kVector;
  uint32_t words[kElements];

  DDPM_FAST_HD void fetch(const void* base, DType dtype, const Lane<Layout>& at) {
    switch (dtype) {
      case DType::kFloat32: return fetch_as<Float32>(base, at);
      case DType::kUInt8: return fetch_as<Pixel>(base, at);
      default: return fetch_as<BFloat16>(base, at);  // or any of 16 bits
    }
  }
  // float32 in [-1, 1], of pixels too.
  DDPM_FAST_HD void unit(DType dtype, float (&out)[kElements]) const {
    switch (dtype) {
      case DType::kFloat32: return values_as<Float32>(out);
      case DType::kBFloat16: return values_as<BFloat16>(out);
      case DType::kFloat16: return values_as<Float16>(out);
      default:
        values_as<Pixel>(out);
        DDPM_FAST_UNROLL
        for (int i = 0; i < kElements; ++i) out[i] = unit_from_pixel<ScalarLanes>(out[i]);
    }
  }

 private:
  template <class Type>
  DDPM_FAST_HD void fetch_as(const void* base, const Lane<Layout>& at) {
    constexpr int kBytes = kVector * Type::kSize < 16 ? kVector * Type::kSize : 16;
    constexpr int kWords = kVector * Type::kSize / 4;  // of a vector
    const void* p = element(base, at.first, Type::kSize);
#if !defined(__CUDA_ARCH__)
    std::memset(words, 0, sizeof words);
#endif
    DDPM_FAST_UNROLL
    for (int i = 0; i < Layout::kVectors; ++i) {
      if (!at.holds(i)) continue;
      DDPM_FAST_UNROLL
      for (int j = 0; j < kWords; j += kBytes / 4) {
        const void* from = element(element(p, i * Layout::kStride, Type::kSize), j, 4);
        const Vector<kBytes> v = load_vector<kBytes>(from);
        DDPM_FAST_UNROLL
        for (int k = 0; k < kBytes / 4; ++k) words[i * kWords + j + k] = v.words[k];
      }
    }
  }
  template <class Type>
  DDPM_FAST_HD void values_as(float (&out)[kElements]) const {
    constexpr int kWords = kElements * Type::kSize / 4;
    uint32_t taken[kWords];
    DDPM_FAST_UNROLL
    for (int i = 0; i < kWords; ++i) taken[i] = words[i];
    Type::unpack(taken, out);
  }
};

template <class Params>
DDPM_FAST_HD NoiseKey noise_key(const Params& p, int64_t n) {
  return p.source.key(n, p.draw.draw(n));
}

// eps of a lane's elements, given or drawn.
template <class Params, class Layout>
DDPM_FAST_HD void noise_of(const Params& p, const Lane<Layout>& at, uint32_t n, uint32_t tile,
                           int lane, float (&z)[Layout::kElements]) {
  if (p.noise != nullptr) {
    at.load(p.noise, p.noise_dtype, z);
  } else {
    Layout::draw(noise_key(p, n), p.shape, tile, lane, z);
  }
}

DDPM_FAST_HD float unit_at(const void* base, DType dtype, int64_t i) {
  const float x0 = value_at(base, dtype, i);
  return dtype == DType::kUInt8 ? unit_from_pixel<ScalarLanes>(x0) : x0;
}

// Whether vectors of kVector elements reach a tensor: what lies a whole number of samples further
// is then reached as well, so that a part of a batch has its sums in the same order as the whole.
template <int kVector>
bool reached(const void* base, DType dtype) {
  const int64_t bytes = kVector * size_of(dtype);
  return aligned(base, bytes < 16 ? bytes : 16);
}

// visit(M{}, layout) for the vectors that reach all of a problem's tensors; false if none do.
template <class Params, class Visit>
bool visit_objective(const Params& p, const Visit& visit) {
  if (!is_regular(p.shape)) return false;
  const auto of_type = [&](auto m) {
    using M = decltype(m);
    constexpr int kVector = vector_of<M>();
    return p.model_dtype == M::kDType && reached<kVector>(p.model_output, p.model_dtype) &&
           reached<kVector>(p.gradient, p.model_dtype) && reached<kVector>(p.x0, p.x0_dtype) &&
           reached<kVector>(p.noise, p.noise_dtype) &&
           visit_layout<kVector>(p.shape, [&](auto layout) { visit(m, layout); });
  };
  return of_type(Float32{}) || of_type(BFloat16{}) || of_type(Float16{});
}

}  // namespace cuda
}  // namespace ddpm_fast
