// Every op's schema, in one place. The fakes that torch.compile and opcheck need are in pyprune/ops/_fake.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyprune, m) {
  // Flat row sums and flat column sums, tensor after tensor; formula: see csrc/common.h
  m.def("salience(Tensor[] weights, Tensor[] grads, Tensor[] curvatures, int formula) -> (Tensor, Tensor)");
  // The same sums, what a call is in host memory, and its workspace; salience_again_ makes the call anew: it reads the
  // tensors' values of that time, by addresses that it holds, and writes the sums once more
  m.def(
      "salience_prepare(Tensor[] weights, Tensor[] grads, Tensor[] curvatures, int formula) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("salience_again_(Tensor(a!) row_sums, Tensor(b!) col_sums, Tensor host, Tensor(c!) workspace) -> ()");
  // curvatures += scale * grads^2
  m.def("accumulate_square_(Tensor(a!)[] curvatures, Tensor[] grads, float scale) -> ()");
  // runs [n, 3] = (source, dest, length) in elements; run_counts: runs of each dimension of each tensor, -1 = whole
  m.def("gather(Tensor[] tensors, Tensor runs, int[] run_counts, Tensor(a!)[] out) -> ()");
  // Row and column sums of one weight's salience, from its inputs [B, T, I] and output gradients [B, T, O]
  m.def(
      "activation_salience(Tensor x, Tensor dy, Tensor weight, int formula, bool transposed, float gradient_scale, "
      "float curvature_scale) -> (Tensor, Tensor)");
  // [T, C] or [B, T, C] to the sums [C] of x and of x^2 over everything but the channels
  m.def("channel_moments(Tensor x) -> (Tensor, Tensor)");
  // two of [T, C] or [B, T, C] to the sums [B, C] of a * b over T
  m.def("channel_dots(Tensor a, Tensor b) -> Tensor");
}
