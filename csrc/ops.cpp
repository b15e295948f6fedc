// Every op's schema on one page. What belongs to an op `foo` has that stem: its arguments and
// checks in ops/foo.h, its implementations in cpu/ops/foo.cpp and cuda/ops/foo.cpp, the parameters
// of its kernels in foo.h and these in cpu/foo.cpp and cuda/foo.cu; a norm's backward stands beside
// it; linear_chain, weight_gradients and backpropagate share the
// products of gemm.h. Twins in plain PyTorch: fastdfa/ops/reference.py, which is the specification.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastdfa, m) {
  // out [C, n] = the feedback matrix of (seed, stream, distribution), unit variance.
  m.def("fill_feedback_(Tensor(a!) out, int seed, int stream, int distribution) -> ()");

  // error [M, C]; feedback: one [C, >= max n_l] for all layers, or one for each, or none (then it
  // is generated: streams, one for all or one for each), in the accumulation dtype or in saved's;
  // saved: L x [M, n_l]. allow_tf32: the product of float32 may use it.
  // -> L x delta [M, n_l] = scales[l] * (sum_error ? M : 1) * (error @ B_l) * f'_l(saved_l),
  //    then L x bias gradient [n_l] = sum of the rows of delta, in the accumulation dtype.
  m.def(
      "project_gate(Tensor error, Tensor[] feedback, int seed, int[] streams, int distribution, "
      "Tensor[] saved, int[] kinds, float[] params, float[] scales, bool sum_error, "
      "bool allow_tf32) -> Tensor[]");

  // grad, saved [M, n] -> (delta [M, n] = grad * f'(saved), bias gradient [n]).
  m.def("gate(Tensor grad, Tensor saved, int kind, float param) -> (Tensor, Tensor)");

  // x [*, n] = f(x + bias [n]).
  m.def("activate_(Tensor(a!) x, Tensor? bias, int kind, float param) -> ()");

  // a [M, n], weight, bias, running_mean, running_var [n]: these in the dtype of a or in its
  // accumulation dtype. kind: one whose derivative is a function of the output.
  // -> h [M, n] = f((a - mean) * rstd * weight + bias), mean [n], rstd [n] = 1 / sqrt(var + eps).
  // training: of the columns of a, and running_mean and running_var (unbiased) are moved by
  // momentum; else of these.
  m.def(
      "batch_norm(Tensor a, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps, int kind, float param) "
      "-> (Tensor, Tensor, Tensor)");

  // delta [M, n] at the output of the norm, becomes the gradient of a; delta_sums [n] of its rows.
  // -> weight gradient [n], sum of the rows of the gradient of a [n].
  m.def(
      "batch_norm_backward_(Tensor(a!) delta, Tensor delta_sums, Tensor a, Tensor mean, "
      "Tensor rstd, Tensor? weight, bool training) -> (Tensor, Tensor)");

  // The same of the rows of a: mean and rstd [M].
  m.def(
      "layer_norm(Tensor a, Tensor? weight, Tensor? bias, float eps, int kind, float param) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward_(Tensor(a!) delta, Tensor a, Tensor mean, Tensor rstd, Tensor? weight) "
      "-> (Tensor, Tensor)");

  // CPU, float32 and float64; with AVX-512 BF16 bfloat16, weights and biases in float32. x [M,
  // n_0], weights: L x [n_l, n_{l-1}], biases: L x [n_l] or None.
  // -> L x h_l [M, n_l] = f_l(h_{l-1} weights[l]^T + biases[l]), h_0 = x.
  m.def(
      "linear_chain(Tensor x, Tensor[] weights, Tensor?[] biases, int[] kinds, float[] params) "
      "-> Tensor[]");

  // CPU, the same dtypes; of bfloat16 the result is float32. deltas: L x [M, n_l], inputs:
  // L x [M, k_l].
  // -> L x [n_l, k_l] = deltas[l]^T inputs[l].
  m.def("weight_gradients(Tensor[] deltas, Tensor[] inputs) -> Tensor[]");

  // CPU, the same dtypes; with bfloat16 the weights are float32. Boundaries that are not cut, from
  // the top down: delta [M, n_0], weights: L x [n_{i-1}, n_i], saved: L x [M, n_i].
  // -> L x delta_i [M, n_i] = (delta_{i-1} weights[i]) * f'_i(saved_i), delta_0 = delta; then
  //    L x sum of the rows of delta_i [n_i], in the accumulation dtype.
  m.def(
      "backpropagate(Tensor delta, Tensor[] weights, Tensor[] saved, int[] kinds, float[] params) "
      "-> Tensor[]");
}
