// Clusters of tokens: which landmark each is nearest to, and means over them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <optional>
#include <tuple>

#include "vectors.h"

namespace {

// `ops.nearest_landmarks` of points [b n c] and landmarks, token indices [b m]: long [b n], -1 for
// those not `allowed` [b n]. Ties go to the first, and landmarks to themselves.
inline at::Tensor nearest(const at::Tensor& points, const at::Tensor& landmarks,
                          const std::optional<at::Tensor>& allowed) {
  const int64_t batch = points.size(0), size = points.size(1), dim = points.size(2);
  const int64_t count = landmarks.size(1), width = padded(count);
  constexpr int64_t BLOCK = 48;
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  at::Tensor out = at::empty({batch, size}, points.options().dtype(at::kLong));
  const float* const x = points.const_data_ptr<float>();
  const int64_t* const marks = indices(landmarks, 0, size, "landmarks");
  const bool* const keep = allowed ? allowed->const_data_ptr<bool>() : nullptr;
  int64_t* const found = out.mutable_data_ptr<int64_t>();
  at::parallel_for(0, batch * blocks, 4, [&](int64_t task, int64_t end) {
    Buffer turned(dim * width), less(BLOCK * width), add(width, INF);
    for (int64_t packed = -1; task < end; task++) {
      const int64_t b = task / blocks, begin = task % blocks * BLOCK;
      if (packed != b) {
        packed = b;
        const int64_t* const own = marks + b * count;
        transpose({x + b * size * dim, dim, 1}, count, dim, -2, turned.data(), width, own);
        for (int64_t m = 0; m < count; m++) {  // |y|^2: |x|^2 is the same for all of them
          const float* const y = x + (b * size + own[m]) * dim;
          const bool again = std::find(own, own + m, own[m]) != own + m;
          add[m] = again ? INF : std::inner_product(y, y + dim, y, 0.f);
        }
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
  for (int64_t b = 0; b < batch; b++)
    for (int64_t m = count - 1; m >= 0; m--) found[b * size + marks[b * count + m]] = m;
  for (int64_t i = 0; keep && i < batch * size; i++)
    if (!keep[i]) found[i] = -1;
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
        for (int64_t c = 0; i + 16 < size && c < dim; c += 16)
          __builtin_prefetch(rows.data + 16 * rows.row + c * rows.column, 0, 2);
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
