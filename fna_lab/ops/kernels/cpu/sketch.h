// Random projections.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "vectors.h"

namespace {

// `ops.sketch_points` of [b n c], in any strides, by a draw [g c/g d/g] for g groups: [b n d].
inline at::Tensor sketch_points(const at::Tensor& points, const at::Tensor& draw) {
  constexpr int64_t BLOCK = 48;
  const int64_t batch = points.size(0), size = points.size(1), dim = points.size(2);
  const int64_t groups = draw.size(0), depth = draw.size(1), share = draw.size(2);
  const int64_t width = padded(share), blocks = (size + BLOCK - 1) / BLOCK;
  at::Tensor out = at::empty({batch, size, groups * share}, points.options());
  float* const found = out.mutable_data_ptr<float>();
  const float* table = draw.const_data_ptr<float>();
  Buffer wide(width == share ? 0 : groups * depth * width);
  if (width != share) {
    gather({table, share, 1}, groups * depth, share, wide.data(), width);
    table = wide.data();
  }
  at::parallel_for(0, batch * blocks, 4, [&](int64_t task, int64_t end) {
    Buffer room(width == share ? 0 : BLOCK * width);
    for (; task < end; task++) {
      const int64_t b = task / blocks, begin = task % blocks * BLOCK;
      const int64_t count = std::min(BLOCK, size - begin);
      Matrix x = {points.const_data_ptr<float>() + b * points.stride(0), points.stride(1),
                  points.stride(2)};
      x.data += begin * x.row;
      const Matrix next = {x.data + count * x.row, x.row, x.column};
      const int64_t then = std::min(BLOCK, size - begin - count);
      for (int64_t g = 0; g < groups; g++) {
        const Matrix part = {x.data + g * depth * x.column, x.row, x.column};
        const Matrix ahead = {next.data + g * depth * x.column, x.row, x.column};
        float* const to = found + (b * size + begin) * groups * share + g * share;
        float* const row = width == share ? to : room.data();
        product(count, part, table + g * depth * width, width, depth, row,
                width == share ? groups * share : width, width, nullptr,
                Ahead(ahead, then, depth));
        for (int64_t r = 0; width != share && r < count; r++)
          std::copy_n(row + r * width, share, to + r * groups * share);
      }
    }
  });
  return out;
}

}  // namespace
