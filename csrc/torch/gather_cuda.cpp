#include "../kernels/gather.h"

#include "cuda_stream.h"
#include "tensors.h"

namespace pyprune {
namespace {

void gather(const std::vector<Tensor> tensors, const Tensor runs, const std::vector<int64_t> run_counts,
            const std::vector<Tensor> out) {
  if (tensors.empty()) return;
  const int32_t device = tensors[0].get_device_index();
  for (const auto* list : {&tensors, &out}) check_one_device(*list, device, "gather");
  const CudaScope scope(tensors[0]);
  const GatherCall call = prepare_gather(tensors, runs, run_counts, out, /*vectors_are_columns=*/true);
  const int64_t count = static_cast<int64_t>(call.tensors.size());
  GatherPlan plan = plan_gather(call.tensors.data(), count);
  const Tensor workspace = scope.workspace(tensors[0], plan.table.size());
  check_cuda(gather_cuda(plan, workspace.mutable_data_ptr(), scope.stream()), "gather");
}

}  // namespace
}  // namespace pyprune

// The runs are a CPU tensor beside CUDA tensors: the dispatcher picks CUDA, the kernel reads the runs on the host.
STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gather", TORCH_BOX(&pyprune::gather));
}
