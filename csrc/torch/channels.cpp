#include "../cpu/channels.h"

#include "tensors.h"

namespace pyprune {
namespace {

// A [T, C] tensor is one batch, a [B, T, C] tensor has B.
View channel_view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, "pyprune::channel ops: tensors must have 2 or 3 dimensions");
  return View(t);
}

ChannelCall channel_call(const Tensor& a) {
  const View v = channel_view(a);
  ChannelCall call{};
  call.a = {a.const_data_ptr(), v.stride[0], v.stride[1]};
  call.batches = v.size[0];
  call.rows = v.size[1];
  call.cols = v.size[2];
  call.dtype = dtype_of(a);
  return call;
}

ScalarType sum_type(const ChannelCall& call) {
  return call.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor given) {
  const Tensor x = with_neighbouring_columns(given);
  ChannelCall call = channel_call(x);
  Tensor sums = torch::stable::new_empty(x, {call.cols}, sum_type(call));
  Tensor squares = torch::stable::new_empty(x, {call.cols}, sum_type(call));
  call.sums = sums.mutable_data_ptr();
  call.squares = squares.mutable_data_ptr();
  channels_cpu(call, torch_threads());
  return {sums, squares};
}

Tensor channel_dots(const Tensor given_a, const Tensor given_b) {
  const Tensor a = with_neighbouring_columns(given_a), b = with_neighbouring_columns(given_b);
  ChannelCall call = channel_call(a);
  const View v = channel_view(b);
  STD_TORCH_CHECK(a.dim() == b.dim() && dtype_of(b) == call.dtype && v.size[0] == call.batches &&
                      v.size[1] == call.rows && v.size[2] == call.cols,
                  "pyprune::channel_dots: both tensors have one shape and one dtype");
  Tensor sums = torch::stable::new_empty(a, {call.batches, call.cols}, sum_type(call));
  // Without elements there is nothing to point at, which would look like moments.
  if (a.numel() == 0) return torch::stable::zero_(sums);
  call.b = {b.const_data_ptr(), v.stride[0], v.stride[1]};
  call.sums = sums.mutable_data_ptr();
  channels_cpu(call, torch_threads());
  return sums;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&pyprune::channel_moments));
  m.impl("channel_dots", TORCH_BOX(&pyprune::channel_dots));
}
