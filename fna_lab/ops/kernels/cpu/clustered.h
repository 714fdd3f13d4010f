// Attention to clusters of tokens, before and after values are solved for: what
// `ops.clustered_attention` does, in one pass over the keys and one over the queries.

#pragma once

#include <cmath>
#include <tuple>

#include "attention.h"
#include "clusters.h"
#include "solve.h"

namespace {

// Tokens T that a mask takes away, long [b t], and which of them are no padding, bool [b t].
struct Removed {
  Removed(const std::optional<Tensor>& rows, const std::optional<Tensor>& valid, int64_t size)
      : count(rows ? rows->size(1) : 0),
        rows(rows ? indices(*rows, 0, size, "removed tokens") : nullptr),
        valid(rows ? valid->const_data_ptr<bool>() : nullptr) {}
  // Calls f(token) for each of a picture.
  template <class F>
  void each(int64_t b, F f) const {
    for (int64_t i = b * count; i < (b + 1) * count; i++)
      if (valid[i]) f(rows[i]);
  }
  const int64_t count;
  const int64_t* rows;
  const bool* valid;
};

// What the fit of V' asks for: mean keys [b h m d], sizes [b m], A [b h r m] and
// softmax(s Qr K') V - A Vp [b h r e], Vp [b h m e], and softmax(s Qr K') V itself [b h r e].
//
// Of landmarks [b m] and rows r [b r], token indices, and members [b n], the landmark of each
// token, -1 = none. A token that stands among the rows before tells nothing: its row of A is zero,
// or, where rows are the landmarks (`alone`), one at its own place.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> before_solve(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks,
    const Tensor& members, const Tensor& rows, const std::optional<Tensor>& keys, double scale,
    bool alone, const std::optional<Tensor>& sunk_rows, const std::optional<Tensor>& sunk_valid) {
  const int64_t batch = q.size(0), heads = q.size(1), size = k.size(2), dim = q.size(3);
  const int64_t num = landmarks.size(1), count = rows.size(1), out_dim = v.size(3);
  const int64_t wide = padded(out_dim), room = Sums::room(count, out_dim) + num * dim;
  const Parts parts(size);
  const auto options = q.options();
  Tensor means = at::empty({batch, heads, num, dim}, options);
  Tensor kernel = at::empty({batch, heads, count, num}, options);
  Tensor left = at::empty({batch, heads, count, out_dim}, options);
  Tensor prior = at::empty({batch, heads, num, out_dim}, options);
  Tensor exact = at::empty({batch, heads, count, out_dim}, options);
  Tensor sums = at::empty({batch * heads * parts.count * room}, options);
  float* const rooms = sums.mutable_data_ptr<float>();
  const int64_t* const home = indices(members, -1, num, "members");
  const int64_t* const marks = indices(landmarks, 0, size, "landmarks");
  const int64_t* const tokens = indices(rows, 0, size, "rows");
  const bool* const keep = keys ? keys->const_data_ptr<bool>() : nullptr;
  const Tensor sizes = sizes_of(home, batch, size, num, options);
  const float* const held = sizes.const_data_ptr<float>();
  const Removed gone(sunk_rows, sunk_valid, size);
  std::vector<char> sunk(gone.count ? batch * size : 0);
  for (int64_t b = 0; gone.count && b < batch; b++)
    gone.each(b, [&](int64_t token) { sunk[b * size + token] = 1; });

  at::parallel_for(0, batch * heads * parts.count, 1, [&](int64_t task, int64_t end) {
    FewQueries few(count, dim, out_dim);
    for (int64_t packed = -1; task < end; task++) {
      const int64_t head = task / parts.count, b = head / heads, h = head % heads;
      if (packed != head) {
        packed = head;
        few.pack(head_of(q, b, h), float(scale), tokens + b * count);
      }
      const int64_t begin = task % parts.count * parts.span;
      float* const members_sum = rooms + task * room + Sums::room(count, out_dim);
      std::fill(members_sum, members_sum + num * dim, 0.f);
      few.add(
          head_of(k, b, h), head_of(v, b, h), begin, std::min(parts.span, size - begin),
          sunk.empty() ? nullptr : &sunk[b * size], Sums(rooms + task * room, count, out_dim),
          [&](int64_t j, int64_t some, float* more) {
            for (int64_t i = 0; i < some; i++)
              more[i] = keep && !keep[b * size + j + i] ? -INF : 0;
          },
          [&](int64_t j, int64_t some, Matrix key) {
            for (int64_t i = j; i < j + some; i++, key.data += key.row) {
              const int64_t m = home[b * size + i];
              if (m >= 0) add_row(key, dim, members_sum + m * dim);
            }
          });
    }
  });

  at::parallel_for(0, batch * heads, 1, [&](int64_t head, int64_t end) {
    FewQueries few(count, dim, out_dim);
    Buffer logits(num * few.width), bias(num), top(few.width), total(few.width);
    Buffer own(num * wide), fitted(count * wide);
    for (; head < end; head++) {
      const int64_t b = head / heads, h = head % heads;
      auto part_of = [&](int64_t i) {
        return Sums(rooms + (head * parts.count + i) * room, count, out_dim);
      };
      auto members_sum_of = [&](int64_t i) {
        return rooms + (head * parts.count + i) * room + Sums::room(count, out_dim);
      };
      float* const outputs = exact.mutable_data_ptr<float>() + head * count * out_dim;
      for (int64_t r = 0; r < count; r++)
        put_together(r, parts.count, part_of, out_dim, outputs + r * out_dim);
      float* const mean = means.mutable_data_ptr<float>() + head * num * dim;
      std::copy_n(members_sum_of(0), num * dim, mean);
      for (int64_t i = 1; i < parts.count; i++)
        add_row({members_sum_of(i), num * dim, 1}, num * dim, mean);
      for (int64_t j = 0; j < num; j++) {
        const float share = 1 / std::max(held[b * num + j], 1.f);
        bias[j] = std::log2(held[b * num + j]);
        for (int64_t c = 0; c < dim; c++) mean[j * dim + c] *= share;
      }
      gather(head_of(v, b, h), num, out_dim, own.data(), wide, marks + b * num);
      for (int64_t j = 0; j < num; j++)
        if (!sunk.empty() && sunk[b * size + marks[b * num + j]])
          std::fill(&own[j * wide], &own[j * wide] + wide, 0.f);
      float* const start = prior.mutable_data_ptr<float>() + head * num * out_dim;
      for (int64_t j = 0; j < num; j++)
        std::memcpy(start + j * out_dim, &own[j * wide], out_dim * sizeof(float));

      few.pack(head_of(q, b, h), float(scale), tokens + b * count);
      std::fill(top.begin(), top.end(), LOWEST), std::fill(total.begin(), total.end(), 0.f);
      few.dots({mean, dim, 1}, num, logits.data());
      few.weigh(logits.data(), num, bias.data(), top.data(), total.data());
      float* const a = kernel.mutable_data_ptr<float>() + head * count * num;
      for (int64_t r = 0; r < count; r++) {
        const int64_t* const first = tokens + b * count;
        const bool again = std::find(first, first + r, first[r]) != first + r;
        const float share = again || total[r] == 0 ? 0 : 1 / total[r];
        for (int64_t j = 0; j < num; j++) a[r * num + j] = logits[j * few.width + r] * share;
        if (again && alone) a[r * num + r] = 1;
        for (int64_t c = 0; c < out_dim; c++)
          fitted[r * wide + c] = again ? 0 : -outputs[r * out_dim + c];
      }
      product<To::OUT>(count, {a, num, 1}, own.data(), wide, num, fitted.data(), wide, wide);
      float* const l = left.mutable_data_ptr<float>() + head * count * out_dim;
      for (int64_t r = 0; r < count; r++)
        for (int64_t c = 0; c < out_dim; c++) l[r * out_dim + c] = -fitted[r * wide + c];
    }
  });
  return {means, sizes, kernel, left, prior, exact};
}

// softmax(s Q C' + log w) V' of all tokens; the first of `rows` [b r] get their `exact` outputs;
// and T attend to the clusters and themselves, where there are any. `home` [b n], the cluster of
// each token, tells that they are still in one, and must not count twice.
inline Tensor after_solve(const Tensor& q, const Tensor& means, const Tensor& values,
                          const Tensor& sizes, double scale, const Tensor& rows,
                          const Tensor& exact, int64_t exact_rows, const Tensor& k,
                          const Tensor& v, const std::optional<Tensor>& own_rows,
                          const std::optional<Tensor>& own_valid,
                          const std::optional<Tensor>& home) {
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(2), dim = q.size(3);
  const int64_t num = means.size(2), out_dim = values.size(3), count = rows.size(1);
  const float* const held = sizes.const_data_ptr<float>();
  auto log_sizes = [&](int64_t b, float* to) {
    for (int64_t j = 0; j < num; j++) to[j] = std::log2(held[b * num + j]);
  };
  Tensor out = attend_all(q, means, values, scale,
                          [&](int64_t b, int64_t, float* to) { log_sizes(b, to); });
  float* const found = out.mutable_data_ptr<float>();
  auto place = [&](int64_t b, int64_t h, int64_t token) {
    return found + ((b * size + token) * heads + h) * out_dim;
  };
  const int64_t* const tokens = indices(rows, 0, size, "rows");
  const float* const known = exact.const_data_ptr<float>();
  for (int64_t head = 0; head < batch * heads; head++)
    for (int64_t r = 0; r < std::min(exact_rows, count); r++)
      std::memcpy(place(head / heads, head % heads, tokens[head / heads * count + r]),
                  known + (head * count + r) * out_dim, out_dim * sizeof(float));
  const Removed gone(own_rows, own_valid, size);
  if (!gone.count) return out;
  at::parallel_for(0, batch * heads, 1, [&](int64_t head, int64_t end) {
    FewKeys few(num + 1, dim, out_dim);  // the last one is the token itself
    for (; head < end; head++) {
      const int64_t b = head / heads, h = head % heads;
      few.pack(head_of(means, b, h), head_of(values, b, h), float(scale), num);
      const Matrix query = head_of(q, b, h), key = head_of(k, b, h), value = head_of(v, b, h);
      gone.each(b, [&](int64_t token) {
        log_sizes(b, few.bias.data());
        if (home) {
          const int64_t j = home->const_data_ptr<int64_t>()[b * size + token];
          if (j >= 0) few.bias[j] = std::log2(held[b * num + j] - 1);
        }
        few.bias[num] = 0;
        transpose({key.data + token * key.row, key.row, key.column}, 1, dim, float(scale) * LOG2_E,
                  &few.keys[num], few.width);
        gather({value.data + token * value.row, value.row, value.column}, 1, out_dim,
               &few.values[num * few.wide], few.wide);
        few.attend(1, {query.data + token * query.row, query.row, query.column},
                   place(b, h, token), heads * out_dim);
      });
    }
  });
  return out;
}

// All of `ops.clustered_attention` with `RidgeInverse`; tokens T are `apart`.
inline Tensor clustered_ridge(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& landmarks, const Tensor& members,
                              const std::optional<Tensor>& rows, const std::optional<Tensor>& keys,
                              double scale, double ridge, int64_t exact_rows,
                              const std::optional<Tensor>& apart,
                              const std::optional<Tensor>& valid, bool own, bool sunk) {
  const std::optional<Tensor> none;
  const Tensor marks = landmarks.contiguous(), tokens = rows ? rows->contiguous() : marks;
  const auto [means, sizes, kernel, left, prior, exact] =
      before_solve(q, k, v, marks, members, tokens, keys, scale, !rows, sunk ? apart : none,
                   sunk ? valid : none);
  const Tensor solved = ridge_solve(kernel.flatten(0, 1), left.flatten(0, 1), ridge);
  add_row({solved.const_data_ptr<float>(), 0, 1}, prior.numel(), prior.mutable_data_ptr<float>());
  return after_solve(q, means, prior, sizes, scale, tokens, exact, exact_rows, k, v,
                     own ? apart : none, own ? valid : none,
                     own && sunk ? std::optional<Tensor>(members) : none);
}

}  // namespace
