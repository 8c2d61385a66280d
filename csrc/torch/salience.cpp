#include "../cpu/salience.h"

#include <cstring>

#include "tensors.h"

namespace pyprune {

SalienceCall prepare_salience(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& curvatures, int64_t formula, bool in_place) {
  STD_TORCH_CHECK(!weights.empty(), "pyprune::salience: no weights");
  STD_TORCH_CHECK(formula >= 0 && formula <= 5, "pyprune::salience: unknown formula ", formula);
  SalienceCall call;
  call.formula = static_cast<Formula>(formula);
  const bool with_grad = reads_grad(call.formula), with_curvature = reads_curvature(call.formula);
  STD_TORCH_CHECK(!with_grad || grads.size() == weights.size(), "pyprune::salience: one gradient per weight");
  STD_TORCH_CHECK(!with_curvature || curvatures.size() == weights.size(),
                  "pyprune::salience: one curvature per weight");
  const bool in_double = dtype_of(weights[0]) == Dtype::float64;

  const auto matrix = [&](const Tensor& given, const View& like) {
    STD_TORCH_CHECK(!in_place || View(given).neighbouring_columns(), "pyprune::salience: columns must be neighbours");
    const Tensor t = with_neighbouring_columns(given);
    const View v(t);
    for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(v.size[d] == like.size[d], "pyprune::salience: shapes differ");
    call.held.push_back(t);
    return Matrix{t.const_data_ptr(), v.stride[0], v.stride[1]};
  };

  int64_t rows = 0, cols = 0;
  std::vector<std::pair<int64_t, int64_t>> offsets;
  for (size_t i = 0; i < weights.size(); ++i) {
    const View v(weights[i]);
    SalienceTensor t{};
    t.dtype = dtype_of(weights[i]);
    STD_TORCH_CHECK((t.dtype == Dtype::float64) == in_double,
                    "pyprune::salience: float64 does not mix with other dtypes");
    t.weight = matrix(weights[i], v);
    t.grad_dtype = t.dtype;
    if (with_grad) {
      t.grad = matrix(grads[i], v);
      t.grad_dtype = dtype_of(grads[i]);
      STD_TORCH_CHECK(t.grad_dtype == t.dtype || (t.grad_dtype == Dtype::float32 && !in_double),
                      "pyprune::salience: a gradient has the dtype of its weight, or float32");
    }
    if (with_curvature) {
      t.curvature = matrix(curvatures[i], v);
      STD_TORCH_CHECK(dtype_of(curvatures[i]) == (in_double ? Dtype::float64 : Dtype::float32),
                      "pyprune::salience: a curvature is float32, or float64 beside float64");
    }
    t.batches = v.size[0];
    t.rows = v.size[1];
    t.cols = v.size[2];
    call.tensors.push_back(t);
    offsets.emplace_back(rows, cols);
    // A vector is one column to the caller but one row to the kernels, which like long rows.
    const bool vector = weights[i].dim() == 1;
    rows += vector ? t.cols : t.batches * t.rows;
    cols += vector ? t.rows : t.batches * t.cols;
  }

  const auto sum_type = in_double ? ScalarType::Double : ScalarType::Float;
  call.row_sums = torch::stable::new_empty(weights[0], {rows}, sum_type);
  call.col_sums = torch::stable::new_empty(weights[0], {cols}, sum_type);
  const int64_t sum_size = size_of(wide_of(call.tensors[0].dtype));
  char* row_sums = static_cast<char*>(call.row_sums.mutable_data_ptr());
  char* col_sums = static_cast<char*>(call.col_sums.mutable_data_ptr());
  for (size_t i = 0; i < weights.size(); ++i) {
    void* r = row_sums + offsets[i].first * sum_size;
    void* c = col_sums + offsets[i].second * sum_size;
    const bool vector = weights[i].dim() == 1;
    call.tensors[i].row_sums = vector ? c : r;
    call.tensors[i].col_sums = vector ? r : c;
  }
  return call;
}

namespace {

std::tuple<Tensor, Tensor> salience(const std::vector<Tensor> weights, const std::vector<Tensor> grads,
                                    const std::vector<Tensor> curvatures, int64_t formula) {
  const SalienceCall call = prepare_salience(weights, grads, curvatures, formula);
  salience_cpu(call.formula, call.tensors.data(), static_cast<int64_t>(call.tensors.size()), torch_threads());
  return {call.row_sums, call.col_sums};
}

// What a prepared call holds in host memory: this, and its tensors behind it.
struct Prepared {
  Formula formula;
  int64_t count;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> salience_prepare(const std::vector<Tensor> weights,
                                                            const std::vector<Tensor> grads,
                                                            const std::vector<Tensor> curvatures, int64_t formula) {
  const SalienceCall call = prepare_salience(weights, grads, curvatures, formula, /*in_place=*/true);
  const Prepared head{call.formula, static_cast<int64_t>(call.tensors.size())};
  const size_t bytes = call.tensors.size() * sizeof(SalienceTensor);
  const Tensor host = host_bytes(weights[0], static_cast<int64_t>(sizeof(head) + bytes));
  char* to = static_cast<char*>(host.mutable_data_ptr());
  std::memcpy(to, &head, sizeof(head));
  std::memcpy(to + sizeof(head), call.tensors.data(), bytes);
  return {call.row_sums, call.col_sums, host, host_bytes(weights[0], 0)};
}

void salience_again_(const Tensor, const Tensor, const Tensor host, const Tensor) {
  const char* from = static_cast<const char*>(host.const_data_ptr());
  const auto* head = reinterpret_cast<const Prepared*>(from);
  const auto* tensors = reinterpret_cast<const SalienceTensor*>(from + sizeof(Prepared));
  salience_cpu(head->formula, tensors, head->count, torch_threads());
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("salience", TORCH_BOX(&pyprune::salience));
  m.impl("salience_prepare", TORCH_BOX(&pyprune::salience_prepare));
  m.impl("salience_again_", TORCH_BOX(&pyprune::salience_again_));
}
