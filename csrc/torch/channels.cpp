#include "../cpu/channels.h"

#include "tensors.h"

namespace pyprune {

ChannelJob prepare_channels(const Tensor& given_a, const Tensor* given_b) {
  STD_TORCH_CHECK(given_a.dim() == 2 || given_a.dim() == 3, "pyprune::channel ops: tensors have 2 or 3 dimensions");
  const Tensor a = with_neighbouring_columns(given_a);
  const View v(a);
  ChannelJob job{};
  ChannelCall& call = job.call;
  job.held.push_back(a);
  call.a = {a.const_data_ptr(), v.stride[0], v.stride[1]};
  call.batches = v.size[0], call.rows = v.size[1], call.cols = v.size[2];
  call.dtype = dtype_of(a);
  if (given_b != nullptr) {
    const Tensor b = with_neighbouring_columns(*given_b);
    STD_TORCH_CHECK(a.dim() == b.dim() && a.scalar_type() == b.scalar_type(),
                    "pyprune::channel_dots: both tensors have one shape and one dtype");
    const View w(b);
    for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(v.size[d] == w.size[d], "pyprune::channel_dots: shapes differ");
    job.held.push_back(b);
    call.b = {b.const_data_ptr(), w.stride[0], w.stride[1]};
  }

  const ScalarType type = call.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  if (given_b == nullptr) {
    job.sums = torch::stable::new_empty(a, {call.cols}, type);
    job.squares = torch::stable::new_empty(a, {call.cols}, type);
    call.squares = job.squares.mutable_data_ptr();
  } else {
    job.sums = torch::stable::new_empty(a, {call.batches, call.cols}, type);
  }
  call.sums = job.sums.mutable_data_ptr();
  job.empty = a.numel() == 0;
  if (job.empty) {
    torch::stable::zero_(job.sums);
    if (given_b == nullptr) torch::stable::zero_(job.squares);
  }
  return job;
}

namespace {

std::tuple<Tensor, Tensor> channel_moments(const Tensor x) {
  const ChannelJob job = prepare_channels(x);
  if (!job.empty) channels_cpu(job.call, torch_threads());
  return {job.sums, job.squares};
}

Tensor channel_dots(const Tensor a, const Tensor b) {
  const ChannelJob job = prepare_channels(a, &b);
  if (!job.empty) channels_cpu(job.call, torch_threads());
  return job.sums;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&pyprune::channel_moments));
  m.impl("channel_dots", TORCH_BOX(&pyprune::channel_dots));
}
