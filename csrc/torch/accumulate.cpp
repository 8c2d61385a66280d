#include "../cpu/accumulate.h"

#include "tensors.h"

namespace pyprune {

std::vector<AccumulateTensor> prepare_accumulate(const std::vector<Tensor>& curvatures, std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(curvatures.size() == grads.size(), "pyprune::accumulate_square_: one gradient per curvature");
  std::vector<AccumulateTensor> tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    grads[i] = torch::stable::contiguous(grads[i]);
    const Dtype grad = dtype_of(grads[i]);
    STD_TORCH_CHECK(curvatures[i].is_contiguous() && curvatures[i].numel() == grads[i].numel(),
                    "pyprune::accumulate_square_: a curvature is contiguous and has the shape of its gradient");
    STD_TORCH_CHECK(dtype_of(curvatures[i]) == (grad == Dtype::float64 ? Dtype::float64 : Dtype::float32),
                    "pyprune::accumulate_square_: a curvature is float32, or float64 beside float64");
    tensors.push_back({curvatures[i].mutable_data_ptr(), grads[i].const_data_ptr(), grads[i].numel(), grad});
  }
  return tensors;
}

namespace {

void accumulate_square_(const std::vector<Tensor> curvatures, std::vector<Tensor> grads, double scale) {
  const std::vector<AccumulateTensor> tensors = prepare_accumulate(curvatures, grads);
  accumulate_square_cpu(tensors.data(), static_cast<int64_t>(tensors.size()), scale, torch_threads());
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("accumulate_square_", TORCH_BOX(&pyprune::accumulate_square_));
}
