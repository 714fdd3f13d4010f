// Clusters of tokens: which landmark each is nearest to, and means over them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "vectors.h"

namespace {

// The place in [b m c] of the mark nearest to each of [b n c], long [b n]; the first of equal ones.
// Adds `square` [b m] - 2 x y', which is the squared distance but for |x|^2.
inline at::Tensor nearest(const at::Tensor& points, const at::Tensor& marks,
                          const at::Tensor& square) {
  const int64_t batch = points.size(0), size = points.size(1), dim = points.size(2);
  const int64_t count = marks.size(1), width = padded(count);
  constexpr int64_t BLOCK = 48;
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  at::Tensor out = at::empty({batch, size}, points.options().dtype(at::kLong));
  const float *x = points.const_data_ptr<float>(), *y = marks.const_data_ptr<float>();
  const float* own = square.const_data_ptr<float>();
  int64_t* found = out.mutable_data_ptr<int64_t>();
  at::parallel_for(0, batch * blocks, 4, [&](int64_t task, int64_t end) {
    Buffer turned(dim * width), less(BLOCK * width), add(width, INF);
    for (int64_t packed = -1; task < end; task++) {
      const int64_t b = task / blocks, begin = task % blocks * BLOCK;
      if (packed != b) {
        packed = b;
        std::copy_n(own + b * count, count, add.begin());
        transpose({y + b * count * dim, dim, 1}, count, dim, -2, turned.data(), width);
      }
      const int64_t rows = std::min(BLOCK, size - begin);
      product(rows, {x + (b * size + begin) * dim, dim, 1}, turned.data(), width, dim, less.data(),
              width, width);
      for (int64_t r = 0; r < rows; r++) {
        Vector best = broadcast(INF);
        Integers at = {}, place = {};
        for (int i = 0; i < LANES; i++) place[i] = i;
        for (int64_t c = 0; c < width; c += LANES, place += LANES) {
          const Vector now = load(&less[r * width + c]) + load(&add[c]);
          const Integers nearer = now < best;
          best = nearer ? now : best, at = nearer ? place : at;
        }
        const Vector least = -highest(-best);
        int32_t first = int32_t(width);
        for (int i = 0; i < LANES; i++)
          if (best[i] == least[i] && at[i] < first) first = at[i];
        found[b * size + begin + r] = first < count ? first : 0;
      }
    }
  });
  return out;
}

// How many tokens each cluster holds, [b m], by the cluster of each, [b n], -1 = none.
inline at::Tensor sizes_of(const int64_t* home, int64_t batch, int64_t size, int64_t num,
                           const at::TensorOptions& options) {
  at::Tensor sizes = at::zeros({batch, num}, options);
  float* const held = sizes.mutable_data_ptr<float>();
  for (int64_t i = 0; i < batch * size; i++)
    if (home[i] >= 0) held[i / size * num + home[i]] += 1;
  return sizes;
}

// Means of [b h n d] over clusters, [b h m d], zero where one is empty; and sizes [b m]. The
// cluster of each token is long [b n], -1 = none.
inline std::tuple<at::Tensor, at::Tensor> means(const at::Tensor& x, const at::Tensor& members,
                                                int64_t num) {
  const int64_t batch = x.size(0), heads = x.size(1), size = x.size(2), dim = x.size(3);
  at::Tensor out = at::zeros({batch, heads, num, dim}, x.options());
  const int64_t* const home = indices(members, -1, num, "members");
  const at::Tensor sizes = sizes_of(home, batch, size, num, x.options());
  float* const sums = out.mutable_data_ptr<float>();
  const float* const held = sizes.const_data_ptr<float>();
  at::parallel_for(0, batch * heads, 1, [&](int64_t head, int64_t end) {
    for (; head < end; head++) {
      const int64_t b = head / heads;
      Matrix rows = head_of(x, b, head % heads);
      float* const sum = sums + head * num * dim;
      for (int64_t i = 0; i < size; i++, rows.data += rows.row) {
        if (i + 16 < size) fetch({rows.data + 16 * rows.row, rows.row, rows.column}, 1, dim);
        const int64_t m = home[b * size + i];
        if (m >= 0) add_row(rows, dim, sum + m * dim);
      }
      for (int64_t m = 0; m < num; m++) {
        const float share = 1 / std::max(held[b * num + m], 1.f);
        for (int64_t c = 0; c < dim; c++) sum[m * dim + c] *= share;
      }
    }
  });
  return {out, sizes};
}

}  // namespace
