// From tensors of the stable ABI to the plain structs that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>
#include <utility>
#include <vector>

#include "../common.h"
#include "../cpu/gather.h"
#include "../cpu/parallel.h"

namespace pyprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, "pyprune: dtype must be float32, bfloat16, float16 or float64");
  }
}

// LibTorch's threads.
inline Parallel torch_threads() {
  const auto run = [](int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// A tensor of 1 to 3 dimensions seen as [batches, rows, cols]: [R, C] as [1, R, C], [N] as [1, 1, N].
struct View {
  int64_t size[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 1};
  explicit View(const Tensor& t) {
    const int64_t dims = t.dim();
    STD_TORCH_CHECK(dims >= 1 && dims <= 3, "pyprune: tensors must have 1 to 3 dimensions, got ", dims);
    for (int64_t d = 0; d < dims; ++d) {
      size[3 - dims + d] = t.size(d);
      stride[3 - dims + d] = t.stride(d);
    }
  }
  bool neighbouring_columns() const { return stride[2] == 1 || size[2] <= 1; }
};

// The tensor itself when its columns are neighbours in memory, else a contiguous copy.
inline Tensor with_neighbouring_columns(const Tensor& t) {
  return View(t).neighbouring_columns() ? t : torch::stable::contiguous(t);
}

// Everything that a salience launch needs. `held` keeps copies of unusual layouts alive until the launch is over.
struct SalienceCall {
  Formula formula;
  std::vector<Tensor> held;
  std::vector<SalienceTensor> tensors;
  Tensor row_sums, col_sums;  // flat: the tensors' sums one after the other
};

// With `in_place` columns that are no neighbours are refused instead of copied: the call is to be made again.
SalienceCall prepare_salience(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& curvatures, int64_t formula, bool in_place = false);

// Host memory of `bytes`, whatever device `like` is on.
inline Tensor host_bytes(const Tensor& like, int64_t bytes) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte, std::nullopt, cpu);
}

std::vector<AccumulateTensor> prepare_accumulate(const std::vector<Tensor>& curvatures, std::vector<Tensor>& grads);

// As SalienceCall. Without elements there is nothing to launch, and the sums are zeros.
struct ChannelJob {
  std::vector<Tensor> held;
  ChannelCall call;
  Tensor sums, squares;  // `squares` of one tensor only
  bool empty;
};

// Sums of a and of a^2 over all rows, or, with b, of a * b over the rows of each sample. A [T, C] tensor is one sample,
// a [B, T, C] tensor has B.
ChannelJob prepare_channels(const Tensor& a, const Tensor* b = nullptr);

// As SalienceCall; the scratch memory is the device's own matter.
struct ActivationJob {
  std::vector<Tensor> held;
  ActivationCall call;
  Tensor row_sums, col_sums;
};

ActivationJob prepare_activation(const Tensor& x, const Tensor& dy, const Tensor& weight, int64_t formula,
                                 bool transposed, double gradient_scale, double curvature_scale);

// `held` as in SalienceCall; `runs` [n, 3] int64 on the CPU; run_counts has one entry per tensor and dimension, -1 =
// whole.
struct GatherCall {
  std::vector<Tensor> held;
  std::vector<GatherTensor> tensors;
};

GatherCall prepare_gather(const std::vector<Tensor>& tensors, const Tensor& runs,
                          const std::vector<int64_t>& run_counts, const std::vector<Tensor>& out,
                          bool vectors_are_columns);

}  // namespace pyprune
