#include "../kernels/channels.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

// A [T, C] tensor is one sample, a [B, T, C] tensor has B.
View channel_view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, "pyprune::channel ops: tensors have 2 or 3 dimensions");
  return View(t);
}

// Of products of a and b over the tokens of each sample, or of a and its squares over all tokens.
void channel_sums(const char* what, const Tensor& a, const Tensor* b, Tensor& sums, Tensor* squares) {
  const CudaScope scope(a);
  if (a.numel() == 0) {  // there is no memory to point at
    torch::stable::zero_(sums);
    if (squares != nullptr) torch::stable::zero_(*squares);
    return;
  }
  const Tensor first = with_neighbouring_columns(a);
  const Tensor second = b == nullptr ? first : with_neighbouring_columns(*b);
  const View v(first), w(second);
  ChannelSums call{};
  call.dtype = dtype_of(a);
  STD_TORCH_CHECK(call.dtype != Dtype::float64, "pyprune::", what, ": float64 is for the CPU");
  call.batches = v.size[0], call.tokens = v.size[1], call.channels = v.size[2];
  call.a = {first.const_data_ptr(), v.stride[0], v.stride[1]};
  if (b != nullptr) call.b = {second.const_data_ptr(), w.stride[0], w.stride[1]};
  call.sums = static_cast<float*>(sums.mutable_data_ptr());
  call.squares = squares == nullptr ? nullptr : static_cast<float*>(squares->mutable_data_ptr());
  const Tensor workspace = scope.workspace(a, channel_workspace(call));
  check_cuda(channel_sums_cuda(call, workspace.mutable_data_ptr(), scope.stream()), what);
}

Tensor channel_dots(const Tensor a, const Tensor b) {
  const View v = channel_view(a), w = channel_view(b);
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(v.size[d] == w.size[d], "pyprune::channel_dots: shapes differ");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "pyprune::channel_dots: dtypes differ");
  check_one_device({a, b}, a.get_device_index(), "channel_dots");
  Tensor sums = torch::stable::new_empty(a, {v.size[0], v.size[2]}, ScalarType::Float);
  channel_sums("channel_dots", a, &b, sums, nullptr);
  return sums;
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor x) {
  const int64_t channels = channel_view(x).size[2];
  Tensor sums = torch::stable::new_empty(x, {channels}, ScalarType::Float);
  Tensor squares = torch::stable::new_empty(x, {channels}, ScalarType::Float);
  channel_sums("channel_moments", x, nullptr, sums, &squares);
  return {sums, squares};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("channel_dots", TORCH_BOX(&pyprune::channel_dots));
  m.impl("channel_moments", TORCH_BOX(&pyprune::channel_moments));
}
