#include "../cpu/activation.h"

#include "tensors.h"

namespace pyprune {

ActivationJob prepare_activation(const Tensor& x, const Tensor& dy, const Tensor& weight, int64_t formula,
                                 bool transposed, double gradient_scale, double curvature_scale) {
  STD_TORCH_CHECK(x.dim() == 3 && dy.dim() == 3 && weight.dim() == 2,
                  "pyprune::activation_salience: x and dy have 3 dimensions, the weight has 2");
  STD_TORCH_CHECK(formula >= 2 && formula <= 5, "pyprune::activation_salience: unknown formula ", formula);
  const Dtype dtype = dtype_of(weight);
  STD_TORCH_CHECK(dtype != Dtype::float64, "pyprune::activation_salience: float64 has no kernel");
  STD_TORCH_CHECK(dtype_of(x) == dtype && dtype_of(dy) == dtype, "pyprune::activation_salience: dtypes differ");
  // The rows of a Linear's weight are outputs; those of a Conv1D's are inputs.
  const Tensor rows = with_neighbouring_columns(transposed ? x : dy);
  const Tensor cols = with_neighbouring_columns(transposed ? dy : x);
  const Tensor matrix = with_neighbouring_columns(weight);
  STD_TORCH_CHECK(rows.size(0) == cols.size(0) && rows.size(1) == cols.size(1) && rows.size(2) == weight.size(0) &&
                      cols.size(2) == weight.size(1),
                  "pyprune::activation_salience: shapes differ");

  const auto matrix_of = [](const Tensor& t) {
    const View v(t);
    return Matrix{t.const_data_ptr(), v.stride[0], v.stride[1]};
  };
  ActivationJob job{{rows, cols, matrix},
                    {},
                    torch::stable::new_empty(weight, {weight.size(0)}, ScalarType::Float),
                    torch::stable::new_empty(weight, {weight.size(1)}, ScalarType::Float)};
  ActivationCall& call = job.call;
  call.formula = static_cast<Formula>(formula);
  call.dtype = dtype;
  call.rows_input = matrix_of(rows);
  call.cols_input = matrix_of(cols);
  call.weight = matrix_of(matrix);
  call.batches = x.size(0);
  call.tokens = x.size(1);
  call.rows = weight.size(0);
  call.cols = weight.size(1);
  call.gradient_scale = static_cast<float>(gradient_scale);
  call.curvature_scale = static_cast<float>(curvature_scale);
  call.row_sums = static_cast<float*>(job.row_sums.mutable_data_ptr());
  call.col_sums = static_cast<float*>(job.col_sums.mutable_data_ptr());
  return job;
}

namespace {

std::tuple<Tensor, Tensor> activation_salience(const Tensor x, const Tensor dy, const Tensor weight, int64_t formula,
                                               bool transposed, double gradient_scale, double curvature_scale) {
  const ActivationJob job = prepare_activation(x, dy, weight, formula, transposed, gradient_scale, curvature_scale);
  const Tensor scratch = torch::stable::new_empty(weight, {activation_scratch(job.call)}, ScalarType::Float);
  activation_salience_cpu(job.call, static_cast<float*>(scratch.mutable_data_ptr()), torch_threads());
  return {job.row_sums, job.col_sums};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("activation_salience", TORCH_BOX(&pyprune::activation_salience));
}
