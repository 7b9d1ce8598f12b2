// SPDX-License-Identifier: Apache-2.0
// Definitions of the ops that are linear in their gradient-carrying inputs:
// embedding, matmul, bias.
#pragma once

#include <vector>

#include "kernels/kernels.h"
#include "kernels/reference/number.h"
#include "kernels/squares.h"

namespace gradwire::reference {

template <class Num>
using Result = std::vector<Num>;

// The old content of an output that is added to, or zeros.
template <class Num>
Result<Num> Start(const Tensor& out, bool accumulate) {
  Result<Num> result(static_cast<size_t>(out.num_elements()));
  for (size_t i = 0; accumulate && i < result.size(); ++i) {
    result[i] = At(out, static_cast<int64_t>(i));
  }
  return result;
}

// d_table as it becomes.
template <class Num>
Result<Num> EmbeddingBackward(const Tensor& tokens, const Tensor& d_out,
                              const Tensor& d_table) {
  const int64_t vocab = d_table.dim(0), hidden = d_table.dim(1);
  Result<Num> result;
  for (int64_t id = 0; id < vocab; ++id) {
    for (int64_t c = 0; c < hidden; ++c) {
      Sum<Num> sum;
      sum.Add(At(d_table, id * hidden + c));
      for (int64_t t = 0; t < tokens.dim(0); ++t) {
        if (tokens.data<int32_t>()[t] == id) sum.Add(At(d_out, t * hidden + c));
      }
      result.push_back(sum.Total());
    }
  }
  return result;
}

// out[r] = sum over i with rows[i] = r of x[i].
template <class Num>
Result<Num> ScatterAddRows(const Tensor& x, const Tensor& rows,
                           int64_t num_out) {
  const int64_t cols = x.dim(1);
  Result<Num> result;
  for (int64_t r = 0; r < num_out; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      Sum<Num> sum;
      for (int64_t i = 0; i < rows.dim(0); ++i) {
        if (rows.data<int32_t>()[i] == r) sum.Add(At(x, i * cols + c));
      }
      result.push_back(sum.Total());
    }
  }
  return result;
}

// c[i, j] = sum over l of a[i, l] b[l, j] (+ c), with the strides of a and b.
struct Strides {
  int64_t row, col;
};
template <class Num>
Result<Num> Product(const Tensor& a, Strides as, const Tensor& b, Strides bs,
                    int64_t inner, const Tensor& c, bool accumulate) {
  const int64_t rows = c.dim(0), cols = c.dim(1);
  Result<Num> result;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      Sum<Num> sum;
      if (accumulate) sum.Add(At(c, i * cols + j));
      for (int64_t l = 0; l < inner; ++l) {
        sum.Add(Num(At(a, i * as.row + l * as.col)) *
                Num(At(b, l * bs.row + j * bs.col)));
      }
      result.push_back(sum.Total());
    }
  }
  return result;
}

template <class Num>
Result<Num> MatmulForward(const Tensor& x, const Tensor& w, const Tensor& y,
                          bool accumulate) {
  const int64_t k = x.dim(1);
  return Product<Num>(x, {k, 1}, w, {1, k}, k, y, accumulate);
}

template <class Num>
Result<Num> MatmulBackwardInput(const Tensor& d_y, const Tensor& w,
                                const Tensor& d_x, bool accumulate) {
  return Product<Num>(d_y, {d_y.dim(1), 1}, w, {w.dim(1), 1}, d_y.dim(1), d_x,
                      accumulate);
}

template <class Num>
Result<Num> MatmulBackwardWeight(const Tensor& d_y, const Tensor& x,
                                 const Kernels::WeightGrad& grad) {
  return Product<Num>(d_y, {1, d_y.dim(1)}, x, {x.dim(1), 1}, x.dim(0),
                      grad.d_w, grad.accumulate);
}

// In float64 whatever the number type: the op's own arithmetic.
inline Result<double> RowSquares(const Tensor& x) {
  const int64_t cols = x.dim(1);
  Result<double> result;
  for (int64_t i = 0; i < x.dim(0); ++i) {
    for (int64_t c = 0; c < cols; ++c) {
      if (c % kSquareBlock == 0) result.push_back(0);
      result.back() += At(x, i * cols + c) * At(x, i * cols + c);
    }
  }
  return result;
}

template <class Num>
Result<Num> BiasForward(const Tensor& bias, const Tensor& y) {
  const int64_t n = y.dim(1);
  Result<Num> result;
  for (int64_t i = 0; i < y.num_elements(); ++i) {
    result.push_back(Num(At(y, i)) + Num(At(bias, i % n)));
  }
  return result;
}

template <class Num>
Result<Num> BiasBackward(const Tensor& d_y, const Tensor& d_bias) {
  const int64_t n = d_y.dim(1);
  Result<Num> result;
  for (int64_t c = 0; c < n; ++c) {
    Sum<Num> sum;
    sum.Add(At(d_bias, c));
    for (int64_t t = 0; t < d_y.dim(0); ++t) sum.Add(At(d_y, t * n + c));
    result.push_back(sum.Total());
  }
  return result;
}

// y + x
template <class Num>
Result<Num> Add(const Tensor& x, const Tensor& y) {
  Result<Num> result;
  for (int64_t i = 0; i < x.num_elements(); ++i) {
    result.push_back(Num(At(x, i)) + Num(At(y, i)));
  }
  return result;
}

}  // namespace gradwire::reference
