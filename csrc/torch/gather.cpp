#include "../cpu/gather.h"

#include "tensors.h"

namespace pyprune {
namespace {

// Runs tile their destination in order and stay inside the source: what the kernels rely on, checked once here.
KeptRuns checked_runs(const Run* runs, int64_t count, int64_t source_size, int64_t out_size) {
  if (count < 0) {
    STD_TORCH_CHECK(out_size == source_size, "pyprune::gather: an output differs in a dimension that stays whole");
    return {nullptr, 0, true};
  }
  int64_t next = 0;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(runs[i].source >= 0 && runs[i].length > 0 && runs[i].length <= source_size - runs[i].source,
                    "pyprune::gather: a run leaves its dimension");
    STD_TORCH_CHECK(runs[i].dest == next, "pyprune::gather: runs must fill the output in order");
    next += runs[i].length;
  }
  STD_TORCH_CHECK(next == out_size, "pyprune::gather: an output differs from what its runs keep");
  return {runs, count, false};
}

}  // namespace

GatherCall prepare_gather(const std::vector<Tensor>& tensors, const Tensor& runs,
                          const std::vector<int64_t>& run_counts, const std::vector<Tensor>& out,
                          bool vectors_are_columns) {
  STD_TORCH_CHECK(tensors.size() == out.size(), "pyprune::gather: one output per tensor");
  STD_TORCH_CHECK(runs.is_cpu() && runs.is_contiguous() && runs.scalar_type() == ScalarType::Long && runs.dim() == 2 &&
                      runs.size(1) == 3,
                  "pyprune::gather: runs must be a contiguous int64 [n, 3] on the CPU");
  const Run* all = static_cast<const Run*>(runs.const_data_ptr());
  int64_t taken = 0;
  size_t next_count = 0;
  GatherCall call;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor source = with_neighbouring_columns(tensors[i]);
    const int64_t dims = source.dim();
    View v(source), o(out[i]);
    STD_TORCH_CHECK(out[i].dim() == dims && out[i].is_contiguous() && out[i].element_size() == source.element_size(),
                    "pyprune::gather: an output is contiguous, with the dimensions and element size of its tensor");
    KeptRuns kept[3] = {{nullptr, 0, true}, {nullptr, 0, true}, {nullptr, 0, true}};
    for (int64_t d = 0; d < dims; ++d) {
      STD_TORCH_CHECK(next_count < run_counts.size(), "pyprune::gather: one run count per dimension of each tensor");
      const int64_t count = run_counts[next_count++];
      STD_TORCH_CHECK(count <= runs.size(0) - taken, "pyprune::gather: fewer runs than counted");
      kept[3 - dims + d] = checked_runs(all + taken, count, v.size[3 - dims + d], o.size[3 - dims + d]);
      taken += count < 0 ? 0 : count;
    }
    if (dims == 1 && !vectors_are_columns) {
      std::swap(kept[1], kept[2]);
      std::swap(v.size[1], v.size[2]);
      std::swap(o.size[1], o.size[2]);
      v.stride[1] = 1;
    }
    call.held.push_back(source);
    call.tensors.push_back({source.const_data_ptr(), out[i].mutable_data_ptr(),
                            static_cast<int64_t>(source.element_size()), v.size[0], v.size[1], v.size[2], v.stride[0],
                            v.stride[1], o.size[0], o.size[1], o.size[2], kept[0], kept[1], kept[2]});
  }
  STD_TORCH_CHECK(next_count == run_counts.size() && taken == runs.size(0), "pyprune::gather: more runs than counted");
  return call;
}

namespace {

void gather(const std::vector<Tensor> tensors, const Tensor runs, const std::vector<int64_t> run_counts,
            const std::vector<Tensor> out) {
  // On the CPU the kept elements of a vector are rows of one element, so that long vectors are shared among threads.
  const GatherCall call = prepare_gather(tensors, runs, run_counts, out, /*vectors_are_columns=*/false);
  gather_cpu(call.tensors.data(), static_cast<int64_t>(call.tensors.size()), torch_threads());
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("gather", TORCH_BOX(&pyprune::gather));
}
