#include "../kernels/channels.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

void run(const CudaScope& scope, const ChannelJob& job, const char* what) {
  STD_TORCH_CHECK(job.call.dtype != Dtype::float64, "pyprune::", what, ": float64 is for the CPU");
  if (job.empty) return;
  const Tensor workspace = scope.workspace(job.sums, channel_workspace(job.call));
  check_cuda(channel_sums_cuda(job.call, workspace.mutable_data_ptr(), scope.stream()), what);
}

Tensor channel_dots(const Tensor a, const Tensor b) {
  check_one_device({a, b}, a.get_device_index(), "channel_dots");
  const CudaScope scope(a);
  const ChannelJob job = prepare_channels(a, &b);
  run(scope, job, "channel_dots");
  return job.sums;
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor x) {
  const CudaScope scope(x);
  const ChannelJob job = prepare_channels(x);
  run(scope, job, "channel_moments");
  return {job.sums, job.squares};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("channel_dots", TORCH_BOX(&pyprune::channel_dots));
  m.impl("channel_moments", TORCH_BOX(&pyprune::channel_moments));
}
