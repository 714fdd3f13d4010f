// Points that are spread out: farthest ones one by one, and several of a round.
//
// Distances are sums of squared differences: equal points are at 0.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <numeric>
#include <optional>
#include <vector>

#include "vectors.h"

namespace {

// One set of points, WIDTH of them side by side, and how far each lies from those taken.
class Spread {
 public:
  static constexpr int64_t WIDTH = 4 * LANES;
  static constexpr float TAKEN = -0.5f, BARRED = -1.f, NONE = -2.f;

  Spread(int64_t size, int64_t dim)
      : size(size), dim(dim), blocks((size + WIDTH - 1) / WIDTH),
        grain(1 + 16384 / (WIDTH * std::max<int64_t>(dim, 1))), points(blocks * dim * WIDTH),
        distance(blocks * WIDTH, NONE), best(blocks), place(blocks) {}

  void read(const float* x) {
    parts([&](int64_t i) {
      const int64_t count = std::min(WIDTH, size - i * WIDTH);
      float* const to = &points[i * dim * WIDTH];
      for (int64_t j = 0; j < count; j++)
        for (int64_t c = 0; c < dim; c++) to[c * WIDTH + j] = x[(i * WIDTH + j) * dim + c];
    });
    std::fill_n(distance.begin(), size, INF);
  }

  // Those that must not be taken rank below all others.
  void bar(const bool* allowed) {
    for (int64_t i = 0; allowed && i < size; i++)
      if (!allowed[i]) distance[i] = BARRED;
  }

  // Those that are taken rank below all that may still be.
  void mark(const int64_t* tokens, int64_t count) {
    for (int64_t p = 0; p < count; p++)
      distance[tokens[p]] = std::min(distance[tokens[p]], TAKEN);
  }

  float far(int64_t token) const { return distance[token]; }

  void row(int64_t token, float* out) const {
    for (int64_t c = 0; c < dim; c++)
      out[c] = points[(token / WIDTH * dim + c) * WIDTH + token % WIDTH];
  }

  // Measures all points against some.
  void measure(const int64_t* tokens, int64_t count) {
    Buffer rows(count * dim);
    for (int64_t p = 0; p < count; p++) row(tokens[p], &rows[p * dim]);
    parts([&](int64_t i) {
      float* const far = &distance[i * WIDTH];
      for (int64_t p = 0; p < count; p++) {
        Vector sum[4] = {};
        const float* x = &points[i * dim * WIDTH];
        for (int64_t c = 0; c < dim; c++, x += WIDTH)
#pragma GCC unroll 4
          for (int l = 0; l < 4; l++) {
            const Vector apart = load(x + l * LANES) - rows[p * dim + c];
            sum[l] += apart * apart;
          }
        for (int l = 0; l < 4; l++)
          store(far + l * LANES, -larger(-sum[l], -load(far + l * LANES)));  // not if no number
      }
      best[i] = NONE;
      for (int64_t j = 0; j < WIDTH; j++)
        if (far[j] > best[i]) best[i] = far[j], place[i] = i * WIDTH + j;
    });
  }

  // The farthest point, the first of equal ones, since points were measured.
  int64_t farthest() const {
    int64_t first = 0;
    for (int64_t i = 1; i < blocks; i++)
      if (best[i] > best[first]) first = i;
    return place[first];
  }

 private:
  template <class F>
  void parts(F f) {
    at::parallel_for(0, blocks, grain, [&](int64_t i, int64_t end) {
      for (; i < end; i++) f(i);
    });
  }

  const int64_t size, dim, blocks, grain;
  Buffer points, distance, best;
  std::vector<int64_t> place;
};

// Whether a given point stands among those before it, or must not be taken.
inline bool gives_way(const int64_t* given, int64_t i, const bool* allowed) {
  return std::find(given, given + i, given[i]) != given + i || (allowed && !allowed[given[i]]);
}

// Pictures to threads, or one after the other where that leaves some idle: then threads wait for
// each other whenever points are measured.
template <class F>
void each_picture(int64_t batch, F f) {
  const int64_t grain = batch >= at::get_num_threads() ? 1 : std::max<int64_t>(batch, 1);
  at::parallel_for(0, batch, grain, [&](int64_t b, int64_t end) {
    for (; b < end; b++) f(b);
  });
}

// A run of points, each as far as it was when it was last measured. Distances to what is taken only
// fall: a point is measured again when it may be the farthest, and until it is known not to be.
class Lazy {
 public:
  Lazy(const float* points, int64_t dim, int64_t start, int64_t end, const bool* allowed)
      : points(points), dim(dim), start(start), end(end), first(start), second(start),
        seen(end - start), distance(end - start, INF) {
    for (int64_t i = start; allowed && i < end; i++)
      if (!allowed[i]) far(i) = Spread::BARRED;
  }

  float& far(int64_t i) { return distance[i - start]; }

  // The farthest point from `count` rows of what is taken, the first of equal ones.
  int64_t farthest(const float* taken, int64_t count) {
    if (far(first) < 0) first = second;  // what lay far out likely still does, which saves others
    measure(first, taken, count, 0.f);
    second = first;
    for (int64_t i = start; i < end; i++) {
      if (far(i) < far(first) || i == first) continue;
      measure(i, taken, count, far(first));
      int64_t other = i;
      if (far(i) > far(first) || (far(i) == far(first) && i < first)) std::swap(first, other);
      if (second == first || far(other) > far(second)) second = other;
    }
    return first;
  }

 private:
  void measure(int64_t i, const float* taken, int64_t count, float least) {
    int64_t& from = seen[i - start];
    const float* const x = points + i * dim;
    while (from < count && far(i) >= std::max(least, 0.f)) {
      const float* const rows = taken + from * dim;
      if (from + 4 <= count) near<4>(x, rows, far(i)), from += 4;
      else if (from + 2 <= count) near<2>(x, rows, far(i)), from += 2;
      else near<1>(x, rows, far(i)), from++;
    }
  }

  template <int R>
  void near(const float* x, const float* rows, float& least) const {
    Vector sum[R][2] = {};
    int64_t c = 0;
    for (; c + LANES < dim; c += 2 * LANES)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int l = 0; l < 2; l++) {
          const Vector apart = load(x + c + l * LANES) - load(rows + r * dim + c + l * LANES);
          sum[r][l] += apart * apart;
        }
    for (int r = 0; r < R; r++) {
      if (c < dim) {
        const Vector apart = load(x + c) - load(rows + r * dim + c);
        sum[r][0] += apart * apart;
      }
      least = std::min(least, added(sum[r][0] + sum[r][1])[0]);
    }
  }

  const float* const points;
  const int64_t dim, start, end;
  int64_t first, second;
  std::vector<int64_t> seen;
  std::vector<float> distance;
};

// Channels up to which all points are measured against each that is taken, several side by side.
constexpr int64_t NARROW = 64;
// Values of the points that one thread looks through before it waits for others.
constexpr int64_t GRAIN = 3 << 18;

// Farthest points of [size dim], those in `picks` that are not negative before others.
inline void take_farthest(const float* points, int64_t size, int64_t dim, const bool* allowed,
                          int64_t* picks, int64_t num) {
  Spread spread(size, dim);
  spread.read(points);
  spread.bar(allowed);
  spread.measure(nullptr, 0);
  for (int64_t i = 0; i < num; i++) {
    if (picks[i] < 0 || spread.far(picks[i]) < 0) picks[i] = spread.farthest();
    spread.mark(&picks[i], 1);
    if (i + 1 < num) spread.measure(&picks[i], 1);
  }
}

inline void take_farthest_lazily(const float* points, int64_t size, int64_t dim,
                                 const bool* allowed, int64_t* picks, int64_t num) {
  const int64_t width = padded(dim);
  Buffer wide(width == dim ? 0 : size * width), taken(num * width);
  if (width != dim) {
    gather({points, dim, 1}, size, dim, wide.data(), width);
    points = wide.data();
  }
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t length = std::max((size + threads - 1) / threads, GRAIN / width);
  std::vector<Lazy> runs;
  for (int64_t i = 0; i < size; i += length)
    runs.emplace_back(points, width, i, std::min(size, i + length), allowed);
  auto far = [&](int64_t i) -> float& { return runs[i / length].far(i); };
  std::vector<int64_t> best(runs.size());
  for (int64_t i = 0; i < num; i++) {
    if (picks[i] < 0 || far(picks[i]) < 0) {
      at::parallel_for(0, int64_t(runs.size()), 1, [&](int64_t r, int64_t end) {
        for (; r < end; r++) best[r] = runs[r].farthest(taken.data(), i);
      });
      picks[i] = best[0];
      for (const int64_t other : best)
        if (far(other) > far(picks[i])) picks[i] = other;
    }
    far(picks[i]) = std::min(far(picks[i]), Spread::TAKEN);
    std::copy_n(points + picks[i] * width, width, &taken[i * width]);
  }
}

// `ops.farthest_points` of [b n c]: long [b num], those given, `first` [b g], before others. One
// that stands there before, or is not allowed, gives way at once, or `in_place` to the last points.
inline at::Tensor farthest_points(const at::Tensor& points, int64_t num, const at::Tensor& first,
                                  const std::optional<at::Tensor>& allowed, bool in_place) {
  const int64_t batch = points.size(0), size = points.size(1), dim = points.size(2);
  const int64_t given = first.size(1);
  const int64_t* const all_given = indices(first, 0, size, "first");
  at::Tensor out = at::empty({batch, num}, first.options());
  int64_t* const all_found = out.mutable_data_ptr<int64_t>();
  each_picture(batch, [&](int64_t b) {
    const int64_t* const wanted = all_given + b * given;
    const float* const x = points.const_data_ptr<float>() + b * size * dim;
    const bool* const keep = allowed ? allowed->const_data_ptr<bool>() + b * size : nullptr;
    std::vector<int64_t> picks, places, holes;
    for (int64_t i = 0; i < given; i++) {
      if (in_place && gives_way(wanted, i, keep)) holes.push_back(i);
      else picks.push_back(wanted[i]), places.push_back(i);
    }
    picks.resize(num, -1);
    for (int64_t i = given; i < num; i++) places.push_back(i);
    places.insert(places.end(), holes.begin(), holes.end());
    (dim > NARROW ? take_farthest_lazily : take_farthest)(x, size, dim, keep, picks.data(), num);
    for (int64_t i = 0; i < num; i++) all_found[b * num + places[i]] = picks[i];
  });
  return out;
}

// The first `count` of the largest, equal ones in their order.
inline std::vector<int64_t> largest(const std::vector<float>& x, int64_t count) {
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return x[i] > x[j]; });
  order.resize(std::min<size_t>(order.size(), count));
  return order;
}

// A round of `ops.spread_points`: of the farthest point of each of `runs` runs of tokens, those
// that lie farthest both from all that is taken and from those that lie farther out.
inline std::vector<int64_t> spread_round(const Spread& spread, int64_t size, int64_t dim,
                                         int64_t runs, int64_t count) {
  const int64_t length = (size + runs - 1) / runs, width = padded(runs);
  std::vector<int64_t> candidate(runs);
  std::vector<float> far(runs, Spread::BARRED);
  for (int64_t r = 0; r < runs; r++) {
    candidate[r] = std::min(r * length, size - 1);
    for (int64_t i = r * length; i < std::min(size, (r + 1) * length); i++)
      if (i == r * length || spread.far(i) > far[r]) far[r] = spread.far(i), candidate[r] = i;
  }
  const std::vector<int64_t> order = largest(far, runs);
  Buffer rows(runs * dim), turned(dim * width), own(width), apart(runs * width);
  for (int64_t i = 0; i < runs; i++) {
    spread.row(candidate[order[i]], &rows[i * dim]);
    for (int64_t c = 0; c < dim; c++) own[i] += rows[i * dim + c] * rows[i * dim + c];
  }
  transpose({rows.data(), dim, 1}, runs, dim, -2, turned.data(), width);
  product<To::ROW>(runs, {rows.data(), dim, 1}, turned.data(), width, dim, apart.data(), width,
                   width, own.data());
  std::vector<float> rank(runs);
  for (int64_t i = 0; i < runs; i++) {
    rank[i] = far[order[i]];
    for (int64_t j = 0; j < i; j++)
      rank[i] = std::min(rank[i], std::max(apart[i * width + j] + own[i], 0.f));
  }
  std::vector<int64_t> took = largest(rank, count);
  for (int64_t& i : took) i = candidate[order[i]];
  return took;
}

// `ops.spread_points` of [b n c] in rounds of `counts`: long [b num], those given, `first` [b g],
// in their places. One that stands there before, or is not allowed, gives way to the last points.
// Without `plenty`, runs may hold no point that may be taken.
inline at::Tensor spread_points(const at::Tensor& points, int64_t num, const at::Tensor& first,
                                const std::optional<at::Tensor>& allowed, at::IntArrayRef counts,
                                int64_t runs, bool plenty) {
  const int64_t batch = points.size(0), size = points.size(1), dim = points.size(2);
  const int64_t given = first.size(1);
  const int64_t* const all_given = indices(first, 0, size, "first");
  at::Tensor out = at::empty({batch, num}, first.options());
  int64_t* const all_found = out.mutable_data_ptr<int64_t>();
  each_picture(batch, [&](int64_t b) {
    const int64_t* const wanted = all_given + b * given;
    const bool* const keep = allowed ? allowed->const_data_ptr<bool>() + b * size : nullptr;
    int64_t* const found = std::copy_n(wanted, given, all_found + b * num) - given;
    Spread spread(size, dim);
    spread.read(points.const_data_ptr<float>() + b * size * dim);
    std::vector<int64_t> taken, holes, picks;
    for (int64_t i = 0; i < given; i++) {
      if (gives_way(wanted, i, keep)) holes.push_back(i);
      else taken.push_back(wanted[i]);
    }
    spread.measure(taken.data(), int64_t(taken.size()));
    spread.mark(wanted, given);
    spread.bar(keep);
    for (size_t round = 0; round < counts.size(); round++) {
      if (round) {
        spread.measure(taken.data(), int64_t(taken.size()));
        spread.mark(taken.data(), int64_t(taken.size()));
      }
      taken = spread_round(spread, size, dim, runs, counts[round]);
      if (!plenty) {  // others take the places of those that are none
        std::vector<float> left(size);
        for (int64_t i = 0; i < size; i++) left[i] = spread.far(i);
        std::vector<int64_t> lost;
        for (int64_t& i : taken) {
          if (spread.far(i) < 0) lost.push_back(&i - taken.data());
          else left[i] = Spread::TAKEN;
        }
        if (lost.size() && spread.far(taken[0]) < 0)
          left[taken[0]] = std::min(left[taken[0]], Spread::TAKEN);
        const std::vector<int64_t> fill = largest(left, int64_t(lost.size()));
        const int64_t none = taken[0];
        for (size_t i = 0; i < lost.size(); i++)
          taken[lost[i]] = left[fill[i]] > Spread::BARRED ? fill[i] : none;
      }
      picks.insert(picks.end(), taken.begin(), taken.end());
    }
    std::copy_n(picks.begin(), num - given, found + given);
    for (size_t i = 0; i < holes.size() && num - given + i < picks.size(); i++)
      found[holes[i]] = picks[num - given + i];
  });
  return out;
}

}  // namespace
