// The two long products of the Nystroem chain, softmax(s Q K') V for few keys or few queries.
//
// Both read their inputs in the host's strides and write [b h n d] as a view of [b n h d], so that
// the host merges its heads without a copy. What a row gives depends on no other row, and on no
// batch mate. A mask is one of keys, alike for all queries. Rows without a key get zeros.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>

#include "vectors.h"

namespace {

using at::Tensor;

constexpr int64_t QUERIES = 48;  // rows of a block: its logits stay beside the keys in the L1 cache
constexpr int64_t CHUNK = 4 * QUERIES;  // of queries, for one thread
constexpr int64_t PART = 1024;          // of keys, for one thread
constexpr float LOWEST = -1e30f;        // least of the largest logits: -inf less -inf is none

// What is added to the logits of keys begin to begin + size, in units of log 2: -inf bars a key.
// The mask is [b h n], bool (true = may be attended to) or float32, where -1e30 bars as well.
inline void read_mask(const std::optional<Tensor>& mask, int64_t b, int64_t h, int64_t begin,
                      int64_t size, float* out) {
  if (!mask) {
    std::fill(out, out + size, 0.f);
    return;
  }
  const int64_t step = mask->stride(2);
  const int64_t start = b * mask->stride(0) + h * mask->stride(1) + begin * step;
  if (mask->scalar_type() == at::kBool) {
    const bool* keep = mask->const_data_ptr<bool>() + start;
    for (int64_t j = 0; j < size; j++) out[j] = keep[j * step] ? 0.f : -INF;
  } else {
    const float* bias = mask->const_data_ptr<float>() + start;
    for (int64_t j = 0; j < size; j++) out[j] = bias[j * step] * LOG2_E;
  }
}

// R rows of logits become 2^(logit - their largest), and inverse[r] 1 / their sum.
template <int R>
inline void softmax(float* logits, int64_t width, float* inverse) {
  // What goes across lanes takes long: all rows at a time.
  Vector top[R], sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) top[r] = broadcast(LOWEST);
  for (int64_t c = 0; c < width; c += LANES)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) top[r] = larger(top[r], load(logits + r * width + c));
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) top[r] = highest(top[r]);
  for (int r = 0; r < R; r++, logits += width) {
    Vector total{};
    for (int64_t c = 0; c < width; c += LANES) {
      Vector x = exp2(load(logits + c) - top[r]);
      store(logits + c, x);
      total += x;
    }
    sum[r] = total;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = added(sum[r]);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) inverse[r] = sum[r][0] == 0 ? 0 : 1 / sum[r][0];
}

inline void softmax(int64_t rows, float* logits, int64_t width, float* inverse) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) softmax<ROWS>(logits + r * width, width, inverse + r);
  for (; r < rows; r++) softmax<1>(logits + r * width, width, inverse + r);
}

// Few keys of one head, packed for `product`.
class FewKeys {
 public:
  FewKeys(int64_t marks, int64_t dim, int64_t out_dim)
      : marks(marks), dim(dim), out_dim(out_dim), width(padded(marks)), wide(padded(out_dim)),
        keys(dim * width), values(marks * wide), bias(width, -INF), logits(QUERIES * width),
        spare(wide == out_dim ? 0 : QUERIES * wide) {}

  void pack(Matrix k, Matrix v, float scale, int64_t count) {
    transpose(k, count, dim, scale * LOG2_E, keys.data(), width);
    gather(v, count, out_dim, values.data(), wide);
  }

  // Outputs of at most QUERIES queries, rows `to_row` apart.
  template <class A = NothingAhead>
  void attend(int64_t count, Matrix q, float* to, int64_t to_row, A ahead = {}) {
    float inverse[QUERIES];
    product<To::ROW>(count, q, keys.data(), width, dim, logits.data(), width, width, bias.data(),
                     ahead);
    softmax(count, logits.data(), width, inverse);
    const Matrix weights = {logits.data(), width, 1};
    if (wide == out_dim) {
      product(count, weights, values.data(), wide, marks, to, to_row, wide, inverse);
      return;
    }
    product(count, weights, values.data(), wide, marks, spare.data(), wide, wide, inverse);
    for (int64_t r = 0; r < count; r++)
      std::memcpy(to + r * to_row, &spare[r * wide], out_dim * sizeof(float));
  }

  const int64_t marks, dim, out_dim, width, wide;
  Buffer keys, values, bias;

 private:
  Buffer logits, spare;
};

// Many queries, few keys: they are packed once for each head and thread. `read(b, h, bias)` tells
// what is added to the logits.
template <class Read>
inline Tensor attend_all(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                         Read read) {
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(2), out_dim = v.size(3);
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  Tensor out = at::empty({batch, size, heads, out_dim}, q.options());
  float* const found = out.mutable_data_ptr<float>();
  at::parallel_for(0, batch * heads * chunks, 1, [&](int64_t task, int64_t end) {
    FewKeys few(k.size(2), q.size(3), out_dim);
    for (int64_t packed = -1; task < end; task++) {
      const int64_t head = task / chunks, b = head / heads, h = head % heads;
      if (packed != head) {
        packed = head;
        few.pack(head_of(k, b, h), head_of(v, b, h), float(scale), few.marks);
        read(b, h, few.bias.data());
      }
      int64_t i = task % chunks * CHUNK;
      const int64_t stop = std::min(size, i + CHUNK);
      Matrix rows = head_of(q, b, h);
      rows.data += i * rows.row;
      for (int64_t count; i < stop; i += count) {
        count = std::min(QUERIES, stop - i);
        const Matrix next = {rows.data + count * rows.row, rows.row, rows.column};
        few.attend(count, rows, found + ((b * size + i) * heads + h) * out_dim, heads * out_dim,
                   Ahead(next, std::min(QUERIES, stop - i - count), few.dim));
        rows = next;
      }
    }
  });
  return out.transpose(1, 2);
}

inline Tensor attend_to_few(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& mask, double scale) {
  return attend_all(q, k, v, scale, [&](int64_t b, int64_t h, float* bias) {
    read_mask(mask, b, h, 0, k.size(2), bias);
  });
}

// What a part of the keys gives few queries: sums that are still to be divided.
struct Sums {
  float *values, *top, *total;  // [r wide], and for each query the largest logit and the sum of 2^

  static int64_t room(int64_t queries, int64_t out_dim) {
    return queries * padded(out_dim) + 2 * padded(queries);
  }
  Sums(float* room, int64_t queries, int64_t out_dim)
      : values(room), top(room + queries * padded(out_dim)), total(top + padded(queries)) {
    wide = padded(out_dim);
  }
  void clear(int64_t queries) {
    std::fill(values, values + queries * wide, 0.f);
    std::fill(top, top + padded(queries), LOWEST);
    std::fill(total, total + padded(queries), 0.f);
  }
  int64_t wide;
};

// The output of one query from the sums of all parts: [e].
template <class Part>
inline void put_together(int64_t r, int64_t parts, Part part_of, int64_t out_dim, float* to) {
  float top = LOWEST, total = 0;
  for (int64_t i = 0; i < parts; i++) top = std::max(top, part_of(i).top[r]);
  std::fill(to, to + out_dim, 0.f);
  for (int64_t i = 0; i < parts; i++) {
    const Sums part = part_of(i);
    const float share = exp2(broadcast(part.top[r] - top))[0];
    total += share * part.total[r];
    for (int64_t c = 0; c < out_dim; c++) to[c] += share * part.values[r * part.wide + c];
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  for (int64_t c = 0; c < out_dim; c++) to[c] *= inverse;
}

// Few queries of one head, packed for `product`.
class FewQueries {
 public:
  FewQueries(int64_t queries, int64_t dim, int64_t out_dim)
      : queries(queries), dim(dim), out_dim(out_dim), width(padded(queries)),
        wide(padded(out_dim)),
        most_keys(std::max<int64_t>(TALL, 4096 / std::max<int64_t>(width, LANES) / TALL * TALL)),
        turned(dim * width), logits(most_keys * width), bias(most_keys), shrink(width) {}

  void pack(Matrix q, float scale, const int64_t* index) {
    transpose(q, queries, dim, scale * LOG2_E, turned.data(), width, index);
  }

  // Logits of some keys [size width].
  template <class A = NothingAhead>
  void dots(Matrix k, int64_t size, float* out, A ahead = {}) {
    product(size, k, turned.data(), width, dim, out, width, width, nullptr, ahead);
  }

  // Logits + bias [size width] become 2^ of them, relative to the largest of each column so far.
  void weigh(float* x, int64_t size, const float* more, float* top, float* total) {
    for (int64_t c = 0; c < width; c += LANES) {
      const Vector before = load(top + c);
      Vector now = before;
      for (int64_t j = 0; j < size; j++) {
        Vector y = load(x + j * width + c) + more[j];
        store(x + j * width + c, y);
        now = larger(now, y);
      }
      const Vector less = exp2(before - now);
      Vector sum = load(total + c) * less;
      for (int64_t j = 0; j < size; j++) {
        Vector y = exp2(load(x + j * width + c) - now);
        store(x + j * width + c, y);
        sum += y;
      }
      store(top + c, now), store(total + c, sum), store(&shrink[c], less);
    }
  }

  // Adds up what keys begin to begin + size give. `read(j, count, bias)` tells what is added to
  // their logits, and `seen(j, count, k)` is told when rows of keys lie in the L1 cache. Values of
  // keys that are `sunk` [n] count as zero.
  template <class Read, class Seen>
  void add(Matrix k, Matrix v, int64_t begin, int64_t size, const char* sunk, Sums out, Read read,
           Seen seen) {
    const bool copied = v.column != 1 || wide != out_dim;
    Buffer copy(copied ? most_keys * wide : 0);
    out.clear(queries);
    k.data += begin * k.row, v.data += begin * v.row;
    for (int64_t from = begin, count; from < begin + size; from += count) {
      count = std::min(most_keys, begin + size - from);
      read(from, count, bias.data());
      dots(k, count, logits.data(), Ahead(v, count, out_dim));
      seen(from, count, k);
      weigh(logits.data(), count, bias.data(), out.top, out.total);
      k.data += count * k.row;
      for (int64_t j = 0; sunk && j < count; j++)
        if (sunk[from + j]) std::fill(&logits[j * width], &logits[j * width] + width, 0.f);
      for (int64_t r = 0; from > begin && r < queries; r++)
        if (shrink[r] != 1)
          for (int64_t c = 0; c < wide; c++) out.values[r * wide + c] *= shrink[r];
      if (copied) gather(v, count, out_dim, copy.data(), wide);
      product<To::OUT>(queries, {logits.data(), 1, width}, copied ? copy.data() : v.data,
                       copied ? wide : v.row, count, out.values, wide, wide, nullptr,
                       Ahead(k, std::min(most_keys, begin + size - from - count), dim));
      v.data += count * v.row;
    }
  }

  const int64_t queries, dim, out_dim, width, wide, most_keys;  // so many keys stay in L1

 private:
  Buffer turned, logits, bias, shrink;
};

// How the keys of a head are dealt out to threads, alike for any batch.
struct Parts {
  explicit Parts(int64_t size)
      : count(std::max<int64_t>(1, (size + PART - 1) / PART)), span((size + count - 1) / count) {}
  const int64_t count, span;
};

// Few queries, many keys.
inline Tensor attend_few(const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& mask, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), dim = q.size(3);
  const int64_t size = k.size(2), out_dim = v.size(3), room = Sums::room(queries, out_dim);
  const Parts parts(size);
  Tensor out = at::empty({batch, queries, heads, out_dim}, q.options());
  float* const found = out.mutable_data_ptr<float>();
  Tensor sums = at::empty({batch * heads * parts.count * room}, q.options());
  float* const rooms = sums.mutable_data_ptr<float>();
  at::parallel_for(0, batch * heads * parts.count, 1, [&](int64_t task, int64_t end) {
    FewQueries few(queries, dim, out_dim);
    for (int64_t packed = -1; task < end; task++) {
      const int64_t head = task / parts.count, b = head / heads, h = head % heads;
      if (packed != head) {
        packed = head;
        few.pack(head_of(q, b, h), float(scale), nullptr);
      }
      const int64_t begin = task % parts.count * parts.span;
      few.add(
          head_of(k, b, h), head_of(v, b, h), begin, std::min(parts.span, size - begin), nullptr,
          Sums(rooms + task * room, queries, out_dim),
          [&](int64_t j, int64_t count, float* more) { read_mask(mask, b, h, j, count, more); },
          [](int64_t, int64_t, Matrix) {});
    }
  });
  at::parallel_for(0, batch * heads, 4, [&](int64_t head, int64_t end) {
    for (; head < end; head++)
      for (int64_t r = 0; r < queries; r++)
        put_together(
            r, parts.count,
            [&](int64_t i) {
              return Sums(rooms + (head * parts.count + i) * room, queries, out_dim);
            },
            out_dim, found + ((head / heads * queries + r) * heads + head % heads) * out_dim);
  });
  return out.transpose(1, 2);
}

}  // namespace
