// Memory for kernels to run on under a sanitizer: each tensor in a block of its own that ends where
// the tensor does, so that one element too many is noticed, at any alignment that a slice may have.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/core/convert.h"

namespace sanitize {

using ddpm_fast::DType;
using ddpm_fast::size_of;

inline std::mt19937 random_bits;

// 0 ... count - 1.
inline int64_t pick(int64_t count) {
  return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(count));
}
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[pick(static_cast<int64_t>(values.size()))];
}
inline bool chance() { return pick(2) == 0; }

// Outputs begin as all ones, NaN in each floating-point type.
constexpr unsigned char kUnwritten = 0xFF;

class Memory {
 public:
  Memory() = default;
  // Whole elements are skipped at the beginning, never bytes of one.
  Memory(int64_t count, DType dtype) : count_(count), dtype_(dtype) {
    skipped_ = pick(3) == 0 ? size_of(dtype) * (1 + pick(3)) : 0;
    bytes_.reset(new unsigned char[static_cast<size_t>(skipped_ + bytes())]);
    std::memset(bytes_.get(), kUnwritten, static_cast<size_t>(skipped_ + bytes()));
  }

  static Memory of_values(int64_t count, DType dtype, float scale = 1.0f) {
    Memory memory(count, dtype);
    for (int64_t i = 0; i < count; ++i) memory.set(i, scale * value());
    return memory;
  }

  void* get() const { return bytes_ == nullptr ? nullptr : bytes_.get() + skipped_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(get());
  }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * size_of(dtype_); }

  bool unwritten(int64_t i) const {
    const unsigned char* element = as<unsigned char>() + i * size_of(dtype_);
    for (int64_t b = 0; b < size_of(dtype_); ++b) {
      if (element[b] != kUnwritten) return false;
    }
    return true;
  }
  bool same(const Memory& other) const {
    return bytes() == other.bytes() &&
           (bytes() == 0 || std::memcmp(get(), other.get(), static_cast<size_t>(bytes())) == 0);
  }

 private:
  static float value() { return static_cast<float>(pick(4001) - 2000) / 1000.0f; }

  void set(int64_t i, float x) {
    switch (dtype_) {
      case DType::kFloat32: as<float>()[i] = x; break;
      case DType::kFloat16: as<uint16_t>()[i] = ddpm_fast::half_from_float(x); break;
      case DType::kUInt8: as<uint8_t>()[i] = static_cast<uint8_t>(pick(256)); break;
      case DType::kBFloat16:
        as<uint16_t>()[i] =
            static_cast<uint16_t>(ddpm_fast::bf16_from_float<ddpm_fast::ScalarLanes>(x));
    }
  }

  std::unique_ptr<unsigned char[]> bytes_;
  int64_t count_ = 0, skipped_ = 0;
  DType dtype_ = DType::kFloat32;
};

inline Memory of_floats(int64_t count, float scale = 1.0f) {
  return Memory::of_values(count, DType::kFloat32, scale);
}
inline Memory unwritten_floats(int64_t count) { return Memory(count, DType::kFloat32); }

// int64, exact too.
using Integers = std::unique_ptr<int64_t[]>;
template <class Value>
Integers integers(int64_t count, const Value& value) {
  Integers all(new int64_t[static_cast<size_t>(count)]);
  for (int64_t i = 0; i < count; ++i) all[static_cast<size_t>(i)] = value();
  return all;
}

// Ends the program: that is what a test sees.
inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

}  // namespace sanitize
