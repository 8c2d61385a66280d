#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"
#include "workspace.h"

namespace pyprune {

// A gather made ready on the host: its table, with addresses counted from the table's start.
struct GatherPlan {
  Table table{nullptr};
  uintptr_t entries = 0, first = 0;
  int64_t tiles = 0;
  int count = 0;
  cudaError_t status = cudaSuccess;
};

// The kept slices of each of the tensors, all on one device. Runs are host memory, and may go with the tensors' list.
GatherPlan plan_gather(const GatherTensor* tensors, int64_t count);

// Launches it, once. `workspace` has plan.table.size() bytes on the device.
cudaError_t gather_cuda(GatherPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace pyprune
