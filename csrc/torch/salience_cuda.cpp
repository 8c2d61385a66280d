#include "../kernels/salience.h"

#include <cstring>

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

// A call whose table is on the device. The passes hold addresses in all the rest.
struct Ready {
  SalienceCall call;
  Tensor workspace;
  SaliencePasses passes;
};

// To be asked before a CudaScope: the first weight may be on no CUDA device.
void check_places(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& curvatures) {
  STD_TORCH_CHECK(!weights.empty(), "pyprune::salience: no weights");
  const int32_t device = weights[0].get_device_index();
  for (const auto* list : {&weights, &grads, &curvatures}) check_one_device(*list, device, "salience");
}

Ready ready(const CudaScope& scope, const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& curvatures, int64_t formula, bool in_place) {
  const SalienceCall call = prepare_salience(weights, grads, curvatures, formula, in_place);
  STD_TORCH_CHECK(call.tensors[0].dtype != Dtype::float64, "pyprune::salience: float64 is for the CPU");
  const int64_t count = static_cast<int64_t>(call.tensors.size());
  const Tensor workspace = scope.workspace(weights[0], salience_workspace(call.tensors.data(), count));
  SaliencePasses passes;
  check_cuda(prepare_salience_cuda(call.formula, call.tensors.data(), count, workspace.mutable_data_ptr(),
                                   scope.stream(), passes),
             "salience");
  return {call, workspace, passes};
}

std::tuple<Tensor, Tensor> salience(const std::vector<Tensor> weights, const std::vector<Tensor> grads,
                                    const std::vector<Tensor> curvatures, int64_t formula) {
  check_places(weights, grads, curvatures);
  const CudaScope scope(weights[0]);
  const Ready made = ready(scope, weights, grads, curvatures, formula, /*in_place=*/false);
  check_cuda(launch_salience(made.passes, scope.stream()), "salience");
  return {made.call.row_sums, made.call.col_sums};
}

// The passes in host memory, their table and the partial sums on the device.
std::tuple<Tensor, Tensor, Tensor, Tensor> salience_prepare(const std::vector<Tensor> weights,
                                                            const std::vector<Tensor> grads,
                                                            const std::vector<Tensor> curvatures, int64_t formula) {
  check_places(weights, grads, curvatures);
  const CudaScope scope(weights[0]);
  const Ready made = ready(scope, weights, grads, curvatures, formula, /*in_place=*/true);
  const Tensor host = host_bytes(weights[0], sizeof(SaliencePasses));
  std::memcpy(host.mutable_data_ptr(), &made.passes, sizeof(SaliencePasses));
  // Whichever stream launches it finds the table there.
  check_cuda(cudaStreamSynchronize(scope.stream()), "salience_prepare");
  return {made.call.row_sums, made.call.col_sums, host, made.workspace};
}

void salience_again_(const Tensor row_sums, const Tensor, const Tensor host, const Tensor) {
  const CudaScope scope(row_sums);
  check_cuda(launch_salience(*static_cast<const SaliencePasses*>(host.const_data_ptr()), scope.stream()),
             "salience_again_");
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("salience", TORCH_BOX(&pyprune::salience));
  m.impl("salience_prepare", TORCH_BOX(&pyprune::salience_prepare));
  m.impl("salience_again_", TORCH_BOX(&pyprune::salience_again_));
}
