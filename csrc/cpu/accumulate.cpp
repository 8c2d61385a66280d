#include "accumulate.h"

#include <vector>

#include "../planning/chunks.h"
#include "kernels.h"

namespace pyprune {

void accumulate_square_cpu(const AccumulateTensor* tensors, int64_t count, double scale, const Parallel& parallel) {
  constexpr int64_t kTaskElements = 1 << 16;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) sizes.push_back(tensors[i].size);
  const std::vector<int64_t> limits(sizes.size(), kTaskElements);
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), count);
  const CpuKernels& kernels = cpu_kernels();
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Chunk& task = tasks[i];
    const AccumulateTensor& t = tensors[task.tensor];
    kernels.accumulate(static_cast<char*>(t.curvature) + task.begin * size_of(wide_of(t.grad_dtype)),
                       static_cast<const char*>(t.grad) + task.begin * size_of(t.grad_dtype), task.end - task.begin,
                       t.grad_dtype, scale);
  });
}

}  // namespace pyprune
