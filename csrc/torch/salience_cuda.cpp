#include "../kernels/salience.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

std::tuple<Tensor, Tensor> salience(const std::vector<Tensor> weights, const std::vector<Tensor> grads,
                                    const std::vector<Tensor> curvatures, int64_t formula) {
  STD_TORCH_CHECK(!weights.empty(), "pyprune::salience: no weights");
  const int32_t device = weights[0].get_device_index();
  for (const auto* list : {&weights, &grads, &curvatures}) check_one_device(*list, device, "salience");
  const CudaScope scope(weights[0]);
  const SalienceCall call = prepare_salience(weights, grads, curvatures, formula);
  STD_TORCH_CHECK(call.tensors[0].dtype != Dtype::float64, "pyprune::salience: float64 is for the CPU");
  const int64_t count = static_cast<int64_t>(call.tensors.size());
  const Tensor workspace = scope.workspace(weights[0], salience_workspace(call.formula, call.tensors.data(), count));
  check_cuda(salience_cuda(call.formula, call.tensors.data(), count, workspace.mutable_data_ptr(), scope.stream()),
             "salience");
  return {call.row_sums, call.col_sums};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("salience", TORCH_BOX(&pyprune::salience));
}
