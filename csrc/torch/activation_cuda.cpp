#include "../kernels/activation.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

std::tuple<Tensor, Tensor> activation_salience(const Tensor x, const Tensor dy, const Tensor weight, int64_t formula,
                                               bool transposed, double gradient_scale, double curvature_scale) {
  check_one_device({x, dy, weight}, weight.get_device_index(), "activation_salience");
  const CudaScope scope(weight);
  const ActivationJob job = prepare_activation(x, dy, weight, formula, transposed, gradient_scale, curvature_scale);
  const Tensor workspace = scope.workspace(weight, activation_workspace(job.call));
  check_cuda(activation_salience_cuda(job.call, workspace.mutable_data_ptr(), scope.stream()), "activation_salience");
  return {job.row_sums, job.col_sums};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("activation_salience", TORCH_BOX(&pyprune::activation_salience));
}
