// pyprune._C: how the package was built, and the planning that Python shares with the kernels.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../planning/chunks.h"
#include "../planning/runs.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// A vector of three-field structs as an [n, 3] array.
template <class Triple>
py::array_t<int64_t> as_array(const std::vector<Triple>& triples) {
  static_assert(sizeof(Triple) == 3 * sizeof(int64_t));
  py::array_t<int64_t> out({static_cast<py::ssize_t>(triples.size()), static_cast<py::ssize_t>(3)});
  std::copy_n(reinterpret_cast<const int64_t*>(triples.data()), 3 * triples.size(), out.mutable_data());
  return out;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYPRUNE_COMPILER;
  info["torch_headers"] = PYPRUNE_TORCH_VERSION;
  info["stable_abi"] = "2.10";
  info["cuda"] = bool(PYPRUNE_CUDA_COMPILED);
  info["cuda_version"] = PYPRUNE_CUDA_VERSION;
  info["cuda_archs"] = PYPRUNE_CUDA_ARCH_LIST;
  py::list isas;
#if defined(__x86_64__)
  for (const char* name : pyprune::kIsaNames) isas.append(name);
#else
  isas.append(pyprune::kIsaNames[0]);
#endif
  info["cpu_isas"] = isas;
  return info;
}

py::array_t<int64_t> coalesce_runs(const Int64Array& positions) {
  if (positions.ndim() != 1) throw py::value_error("positions must be 1-D");
  return as_array(pyprune::coalesce_runs(positions.data(), positions.size()));
}

py::array_t<int64_t> chunk_plan(const Int64Array& sizes, int64_t limit) {
  if (sizes.ndim() != 1) throw py::value_error("sizes must be 1-D");
  if (limit < 1) throw py::value_error("limit must be at least 1");
  const std::vector<int64_t> limits(static_cast<size_t>(sizes.size()), limit);
  return as_array(pyprune::chunk_plan(sizes.data(), limits.data(), sizes.size()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How pyprune was built, and the planning of launches.";
  m.def("build_info", &build_info,
        "Compiler, CUDA toolkit and architectures, instruction sets: a dict of what was compiled.");
  m.def(
      "cpu_isa", [] { return pyprune::kIsaNames[static_cast<int>(pyprune::chosen_isa())]; },
      "The instruction set that the CPU kernels use here.");
  m.def("coalesce_runs", &coalesce_runs, py::arg("positions"),
        "Positions [n] (int64, any order) as runs of neighbours: [m, 3] of (source, destination, length).");
  m.def("chunk_plan", &chunk_plan, py::arg("sizes"), py::arg("limit"),
        "Pieces of at most `limit` items of tensors of `sizes` [n] items: [m, 3] of (tensor, begin, end).");
}
