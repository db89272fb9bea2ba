// The native module: integers in (addresses, sizes, codes), work done, nothing out. Checks and
// allocation are Python's (ddpm_fast/ops); torch is not known here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void randn(uintptr_t out, int dtype, int64_t samples, int64_t channels, int64_t pixels,
           bool channels_last, int64_t seed, uintptr_t seeds, uintptr_t sample_ids, uint32_t stream,
           int64_t index, uintptr_t indices, int threads) {
  RandnParams p{};
  p.out = pointer(out);
  p.dtype = static_cast<DType>(dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = {static_cast<uint64_t>(seed), pointer<int64_t>(seeds), pointer<int64_t>(sample_ids)};
  p.stream = stream;
  p.index = index;
  p.indices = pointer<int64_t>(indices);
  py::gil_scoped_release unlocked;
  cpu::randn(p, threads);
}

void add_noise(uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype, uintptr_t out,
               int out_dtype, int64_t samples, int64_t channels, int64_t pixels, bool channels_last,
               int64_t seed, uintptr_t seeds, uintptr_t sample_ids, int64_t index,
               uintptr_t weights, int64_t t, uintptr_t ts, int threads) {
  AddNoiseParams p{};
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.out = pointer(out);
  p.out_dtype = static_cast<DType>(out_dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = {static_cast<uint64_t>(seed), pointer<int64_t>(seeds), pointer<int64_t>(sample_ids)};
  p.index = index;
  p.weights = pointer<float>(weights);
  p.t = t;
  p.ts = pointer<int64_t>(ts);
  py::gil_scoped_release unlocked;
  cpu::add_noise(p, threads);
}

void reverse_step(uintptr_t x, int x_dtype, uintptr_t model_output, uintptr_t model_output_uncond,
                  int model_dtype, uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype,
                  uintptr_t out, uintptr_t out_x0, uintptr_t out_lowp, int out_lowp_dtype,
                  int64_t samples, int64_t channels, int64_t pixels, bool channels_last,
                  int64_t seed, uintptr_t seeds, uintptr_t sample_ids, int variance, float lo,
                  float hi, float guidance_scale, uintptr_t guidance_scales, uintptr_t rows,
                  uintptr_t timesteps, int64_t step, uintptr_t steps, uintptr_t nan_step,
                  int threads) {
  ReverseStepParams p{};
  p.x = pointer(x);
  p.x_dtype = static_cast<DType>(x_dtype);
  p.model_output = pointer(model_output);
  p.model_output_uncond = pointer(model_output_uncond);
  p.model_dtype = static_cast<DType>(model_dtype);
  p.x0 = pointer(x0);
  p.x0_dtype = static_cast<DType>(x0_dtype);
  p.noise = pointer(noise);
  p.noise_dtype = static_cast<DType>(noise_dtype);
  p.out = pointer(out);
  p.out_x0 = pointer(out_x0);
  p.out_lowp = pointer(out_lowp);
  p.out_lowp_dtype = static_cast<DType>(out_lowp_dtype);
  p.shape = {samples, channels, pixels, channels_last};
  p.source = {static_cast<uint64_t>(seed), pointer<int64_t>(seeds), pointer<int64_t>(sample_ids)};
  p.variance = static_cast<Variance>(variance);
  p.lo = lo;
  p.hi = hi;
  p.guidance_scale = guidance_scale;
  p.guidance_scales = pointer<float>(guidance_scales);
  p.rows = pointer<StepRow>(rows);
  p.timesteps = pointer<int64_t>(timesteps);
  p.step = step;
  p.steps = pointer<int64_t>(steps);
  p.nan_step = pointer<int32_t>(nan_step);
  py::gil_scoped_release unlocked;
  cpu::reverse_step(p, threads);
}

// Least and greatest of `count` > 0 integers: checking a small tensor with torch's own min and max
// costs more than a small step.
std::pair<int64_t, int64_t> range(uintptr_t values, int64_t count) {
  const int64_t* v = pointer<int64_t>(values);
  const auto found = std::minmax_element(v, v + count);
  return {*found.first, *found.second};
}

py::list supported_isas() {
  py::list names;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    if (cpu::isa_supported(name)) names.append(name);
  }
  return names;
}

void set_isa(const std::string& name) {
  if (!cpu::isa_supported(name.c_str())) {
    throw py::value_error("instruction set '" + name + "' is not one that runs here: " +
                          py::str(", ").attr("join")(supported_isas()).cast<std::string>());
  }
  cpu::set_isa(name.c_str());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "ddpm_fast's compiled kernels; call them through ddpm_fast.ops";
  m.def("isa", &cpu::isa, "The instruction set that the CPU kernels use.");
  m.def("supported_isas", &supported_isas, "Those that this processor could use, widest first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Uses another instruction set: the same bits.");
  m.def("range", &range);
  m.def("randn", &randn);
  m.def("add_noise", &add_noise);
  m.def("reverse_step", &reverse_step);
  m.attr("compiler") = DDPM_FAST_COMPILER;
  m.attr("openmp") =
#if defined(_OPENMP)
      true;
#else
      false;
#endif
  m.attr("cuda_archs") = py::tuple();
}
