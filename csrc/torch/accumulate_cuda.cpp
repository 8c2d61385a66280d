#include "../kernels/accumulate.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

void accumulate_square_(const std::vector<Tensor> curvatures, std::vector<Tensor> grads, double scale) {
  if (curvatures.empty()) return;
  const int32_t device = curvatures[0].get_device_index();
  check_one_device(curvatures, device, "accumulate_square_");
  check_one_device(grads, device, "accumulate_square_");
  const CudaScope scope(curvatures[0]);
  const std::vector<AccumulateTensor> tensors = prepare_accumulate(curvatures, grads);
  const int64_t count = static_cast<int64_t>(tensors.size());
  for (const AccumulateTensor& t : tensors) {
    STD_TORCH_CHECK(t.grad_dtype != Dtype::float64, "pyprune::accumulate_square_: float64 is for the CPU");
  }
  const Tensor workspace = scope.workspace(curvatures[0], accumulate_workspace(tensors.data(), count));
  check_cuda(accumulate_square_cuda(tensors.data(), count, scale, workspace.mutable_data_ptr(), scope.stream()),
             "accumulate_square_");
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("accumulate_square_", TORCH_BOX(&pyprune::accumulate_square_));
}
