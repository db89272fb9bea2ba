// The native module: integers in (addresses, sizes, codes), work done, nothing out. Checks and
// allocation are Python's (ddpm_fast/ops); torch is not known here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.h"
#include "cpu/kernels.h"
#if defined(DDPM_FAST_HAS_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace ddpm_fast;

namespace {

// make(arguments), run on the CPU: the arguments, then how many threads the call may take.
template <class Params, class... Args>
auto on_cpu(Params (*make)(Args...), void (*run)(const Params&, int)) {
  return [=](Args... args, int threads) {
    const Params params = make(args...);
    py::gil_scoped_release unlocked;
    run(params, threads);
  };
}

#if defined(DDPM_FAST_HAS_CUDA)
// The same on a GPU: the arguments, then the device's index and the stream's handle.
template <class Params, class... Args>
auto on_cuda(Params (*make)(Args...), const char* (*run)(const Params&, int, void*)) {
  return [=](Args... args, int device, uintptr_t stream) {
    const Params params = make(args...);
    const char* error;
    {
      py::gil_scoped_release unlocked;  // a full queue makes a launch wait
      error = run(params, device, pointer(stream));
    }
    if (error != nullptr) throw std::runtime_error(std::string("CUDA launch failed: ") + error);
  };
}
#endif

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
  m.def("set_isa", &set_isa, py::arg("name"),
        "Uses another instruction set. Noise, steps and losses keep their bits; convolutions and "
        "attention are rounded otherwise where there is no fused multiply-add.");
  m.def("release_threads", &cpu::release_threads, py::call_guard<py::gil_scoped_release>(),
        "Ends the threads that OpenMP keeps for the calling one; whether it could.");
  m.def("range", &range);
  m.def("randn", on_cpu(randn_params, cpu::randn));
  m.def("add_noise", on_cpu(add_noise_params, cpu::add_noise));
  m.def("reverse_step", on_cpu(reverse_step_params, cpu::reverse_step));
  m.def("denoising_loss", on_cpu(denoising_loss_params, cpu::denoising_loss));
  m.def("vlb_terms", on_cpu(vlb_terms_params, cpu::vlb_terms));
  m.def("group_norm_silu", on_cpu(group_norm_silu_params, cpu::group_norm_silu));
  m.def("group_norm_silu_sums", on_cpu(group_norm_silu_bwd_params, cpu::group_norm_silu_sums));
  m.def("group_norm_silu_bwd", on_cpu(group_norm_silu_bwd_params, cpu::group_norm_silu_bwd));
  m.def("conv2d", on_cpu(conv2d_params, cpu::conv2d));
  m.def("winograd_conv2d", on_cpu(conv2d_params, cpu::winograd_conv2d));
  m.def("attention", on_cpu(attention_params, cpu::attention));
  m.attr("compiler") = DDPM_FAST_COMPILER;
  m.attr("openmp") = cpu::has_threads();
#if defined(DDPM_FAST_HAS_CUDA)
  py::module_ gpu = m.def_submodule("cuda", "the CUDA kernels");
  gpu.def("randn", on_cuda(randn_params, cuda::randn));
  gpu.def("add_noise", on_cuda(add_noise_params, cuda::add_noise));
  gpu.def("reverse_step", on_cuda(reverse_step_params, cuda::reverse_step));
  gpu.def("denoising_loss", on_cuda(denoising_loss_params, cuda::denoising_loss));
  gpu.def("vlb_terms", on_cuda(vlb_terms_params, cuda::vlb_terms));
  gpu.def("group_norm_silu", on_cuda(group_norm_silu_params, cuda::group_norm_silu));
  gpu.def("group_norm_silu_sums", on_cuda(group_norm_silu_bwd_params, cuda::group_norm_silu_sums));
  gpu.def("group_norm_silu_bwd", on_cuda(group_norm_silu_bwd_params, cuda::group_norm_silu_bwd));
  gpu.def("driver_version", &cuda::driver_version);
  gpu.def("runtime_version", &cuda::runtime_version);
  // What the module holds: "sm_90" is machine code, "compute_90" PTX that a driver can compile.
  gpu.attr("targets") = py::str(DDPM_FAST_CUDA_TARGETS).attr("split")();
#else
  m.attr("cuda") = py::none();
#endif
}
