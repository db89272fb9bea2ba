#include "group_norm_silu.cuh"
#include "group_norm_silu_launch.cuh"

namespace ddpm_fast {
namespace cuda {
namespace {

// A block a group.
template <class Finish, class Params>
__global__ void __launch_bounds__(kThreads)
    group_finish_kernel(const __grid_constant__ Params p, const __grid_constant__ Divider divider) {
  const typename Finish::Group at(p, divider, blockIdx.x, threadIdx.x, blockDim.x);
  Sums<1> sum = Finish::sum(p, at);
  add_block(sum);
  const float about = sum.of[0] / static_cast<float>(p.shape.group_elements());
  Sums<2> sums = Finish::sums_about(p, at, about);
  add_block(sums);
  Finish::put(p, at, about, sums);
}

template <class Layout>
const char* launch_group_norm_silu(const GroupNormSiluParams& p, cudaStream_t stream) {
  const char* error =
      launch_parts<GroupNormSiluMoments<Layout>>(p, group_tiles<Layout>(p.shape, p.chunk), stream);
  if (error != nullptr) return error;
  const int64_t groups = p.shape.samples * p.shape.groups;
  const int64_t shares = p.chunks * p.shape.group_channels();
  if (groups >> 31 != 0 || shares >> 31 != 0) return kTooLarge;
  group_finish_kernel<GroupNormSiluFinish>
      <<<static_cast<unsigned>(groups), threads_for(shares), 0, stream>>>(
          p, divider(p.shape.group_channels()));
  error = launched();
  if (error != nullptr) return error;
  return launch_tiles<GroupNormSiluApply<Layout>>(p, group_tiles<Layout>(p.shape, 0), stream);
}

}  // namespace

const char* group_norm_silu(const GroupNormSiluParams& params, int device, void* stream) {
  const char* error = select_device(device);
  if (error != nullptr || params.shape.samples * params.shape.channels == 0 ||
      params.shape.pixels() == 0) {
    return error;
  }
  visit_group_norm_silu(params, [&](auto layout) {
    error = launch_group_norm_silu<decltype(layout)>(params, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace cuda
}  // namespace ddpm_fast
