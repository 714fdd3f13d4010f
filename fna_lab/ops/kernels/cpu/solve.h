// The ridge solution, which Gram matrix of the two is the smaller.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "vectors.h"

namespace {

// (A'A + ridge I)^-1 A' B, or the same as A' (A A' + ridge I)^-1 B where A has fewer rows than
// columns: A [k r m], B [k r e] -> [k m e].
inline at::Tensor ridge_solve(const at::Tensor& kernel, const at::Tensor& values, double ridge) {
  const int64_t batch = kernel.size(0), rows = kernel.size(1), num = kernel.size(2);
  const int64_t dim = values.size(2), wide = padded(dim);
  const bool flat = rows < num;
  const int64_t side = flat ? rows : num, width = padded(side), depth = flat ? num : rows;
  at::Tensor out = at::empty({batch, num, dim}, kernel.options());
  const float* const all_a = kernel.const_data_ptr<float>();
  const float* const all_b = values.const_data_ptr<float>();
  float* const found = out.mutable_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t i, int64_t end) {
    Buffer turned(depth * width), gram(side * width), x(std::max(rows, side) * wide);
    Buffer result(num * wide), right(rows * wide);
    for (; i < end; i++) {
      const float* const a = all_a + i * rows * num;
      const Matrix as_is = {a, num, 1}, transposed = {a, 1, num};
      gather({all_b + i * rows * dim, dim, 1}, rows, dim, right.data(), wide);
      transpose(flat ? as_is : transposed, side, depth, 1, turned.data(), width);
      product(side, flat ? as_is : transposed, turned.data(), width, depth, gram.data(), width,
              width);
      for (int64_t s = 0; s < side; s++) gram[s * width + s] += float(ridge);
      if (flat) std::copy(right.begin(), right.end(), x.begin());
      else product(num, transposed, right.data(), wide, rows, x.data(), wide, wide);
      // Cholesky, gram = U'U with U in its upper half; then U'y = x and U z = y, in place.
      auto less = [&](float* row, float factor, const float* other, int64_t from, int64_t to) {
        for (int64_t c = from; c < to; c += LANES)
          store(row + c, load(row + c) - broadcast(factor) * load(other + c));
      };
      for (int64_t s = 0; s < side; s++) {
        float* const row = &gram[s * width];
        const float inverse = 1 / std::sqrt(row[s]);
        for (int64_t t = s; t < side; t++) row[t] *= inverse;
        for (int64_t t = s + 1; t < side; t++)
          less(&gram[t * width], row[t], row, t / LANES * LANES, width);
      }
      for (int64_t s = 0; s < side; s++) {
        for (int64_t t = 0; t < s; t++)
          less(&x[s * wide], gram[t * width + s], &x[t * wide], 0, wide);
        for (int64_t c = 0; c < wide; c++) x[s * wide + c] /= gram[s * width + s];
      }
      for (int64_t s = side - 1; s >= 0; s--) {
        for (int64_t t = s + 1; t < side; t++)
          less(&x[s * wide], gram[s * width + t], &x[t * wide], 0, wide);
        for (int64_t c = 0; c < wide; c++) x[s * wide + c] /= gram[s * width + s];
      }
      const float* solved = x.data();
      if (flat) {
        product(num, transposed, x.data(), wide, rows, result.data(), wide, wide);
        solved = result.data();
      }
      for (int64_t j = 0; j < num; j++)
        std::copy_n(solved + j * wide, dim, found + (i * num + j) * dim);
    }
  });
  return out;
}

}  // namespace
