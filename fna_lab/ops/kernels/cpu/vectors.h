// Vectors of float32, and products of matrices that stay in the caches.
//
// One source for AVX2 and AVX-512: GCC's vector extensions, and intrinsics where it would take two
// instructions for one.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4, TALL = 12;  // 24 of 32 registers hold sums
#else
constexpr int LANES = 8, ROWS = 6, COLUMNS = 2, TALL = 6;  // 12 of 16
#endif

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float INF = __builtin_inff();

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector value) { *reinterpret_cast<Vector*>(x) = value; }
inline Vector broadcast(float x) { return x - Vector{}; }  // minus, for 0 + x is not x where x = -0

// The larger of each; b where one of them is no number.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

// 2^x for x <= 0, to 2e-7 of it: 0 up to -127, and no number of no number.
inline Vector exp2(Vector x) {
  x = larger(broadcast(-127.f), x);
  const Vector magic = broadcast(12582912.f);  // 1.5 * 2^23: sums with it are integers
  Vector whole = x + magic;
  Vector f = x - (whole - magic);
  Vector power = broadcast(1.3276472e-3f);
  power = power * f + 9.6755413e-3f;
  power = power * f + 5.5507133e-2f;
  power = power * f + 2.4022120e-1f;
  power = power * f + 6.9314697e-1f;
  power = power * f + 1.f;
  return (Vector)((Integers)power + ((Integers)whole << 23));
}

template <int STEP>
inline Vector across(Vector x) {
  Integers lane;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) lane[i] = i ^ STEP;
  return __builtin_shuffle(x, lane);
}

// The largest lane, and the sum of all lanes, in every lane.
template <int STEP = LANES / 2>
inline Vector highest(Vector x) {
  if constexpr (STEP == 0) return x;
  else return highest<STEP / 2>(larger(x, across<STEP>(x)));
}
template <int STEP = LANES / 2>
inline Vector added(Vector x) {
  if constexpr (STEP == 0) return x;
  else return added<STEP / 2>(x + across<STEP>(x));
}

// Indices of a contiguous tensor, which all lie in least to below - 1.
inline const int64_t* indices(const at::Tensor& index, int64_t least, int64_t below,
                              const char* name) {
  const int64_t* const found = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); i++)
    TORCH_CHECK_INDEX(found[i] >= least && found[i] < below, "Expected ", name, " from ", least,
                      " to ", below - 1, ", got ", found[i], ".");
  return found;
}

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

template <class T>
struct OnLines {  // vectors that lie across two cache lines take two loads
  using value_type = T;
  OnLines() = default;
  template <class U>
  OnLines(const OnLines<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* x, size_t) { ::operator delete(x, std::align_val_t(64)); }
  template <class U>
  bool operator==(const OnLines<U>&) const { return true; }
};
using Buffer = std::vector<float, OnLines<float>>;

// A matrix whose neighbours in a row and in a column lie so far apart.
struct Matrix {
  const float* data;
  int64_t row, column;
};

// One head of [b h n d] in its strides.
inline Matrix head_of(const at::Tensor& x, int64_t b, int64_t h) {
  const float* data = x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(1);
  return {data, x.stride(2), x.stride(3)};
}

// Rows that are soon asked for: where a host packs q, k and v, each lies in a page of its own. All
// at once they would hold the processor up, so that a product asks for a line at each of its steps.
class Ahead {
 public:
  Ahead(Matrix x, int64_t rows, int64_t dim)
      : next(x.data), row(x.row), all(rows * x.row), end(x.data + all), left(rows > 0 ? dim : 0) {
    if (x.column != 1) left = 0;
  }
  void step() {
    if (left <= 0) return;
    __builtin_prefetch(next, 0, 2);
    next += row;
    if (next != end) return;
    next += LINE - all, end += LINE, left -= LINE;
  }

 private:
  static constexpr int64_t LINE = 16;
  const float* next;
  const int64_t row, all;
  const float* end;
  int64_t left;
};
struct NothingAhead {
  void step() {}
};

// Rows of a matrix, all or those of tokens `index`, as columns, times a factor: [d width].
inline void transpose(Matrix x, int64_t size, int64_t dim, float factor, float* out, int64_t width,
                      const int64_t* index = nullptr) {
  for (int64_t j = 0; j < size; j++) {
    const float* row = x.data + (index ? index[j] : j) * x.row;
    for (int64_t c = 0; c < dim; c++) out[c * width + j] = row[c * x.column] * factor;
  }
}

// Rows of a matrix, all or those of tokens `index`, side by side: [size width].
inline void gather(Matrix x, int64_t size, int64_t dim, float* out, int64_t width,
                   const int64_t* index = nullptr) {
  for (int64_t j = 0; j < size; j++) {
    const float* row = x.data + (index ? index[j] : j) * x.row;
    for (int64_t c = 0; c < dim; c++) out[j * width + c] = row[c * x.column];
  }
}

// Adds the first row of a matrix to another row.
inline void add_row(Matrix x, int64_t dim, float* to) {
  if (x.column == 1)
    for (int64_t c = 0; c < dim; c++) to[c] += x.data[c];
  else
    for (int64_t c = 0; c < dim; c++) to[c] += x.data[c * x.column];
}

// What a product is added to: nothing, a row [c] in every row, or what `out` holds.
enum class To { NOTHING, ROW, OUT };

// out[r][c] = factor[r] * (sum_k a[r][k] b[k][c] + what it is added to) for R rows and C vectors.
template <int R, int C, To TO, class A>
inline void tile(Matrix a, const float* b, int64_t b_row, int64_t depth, float* out,
                 int64_t out_row, const float* more, A& ahead) {
  Vector sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      if constexpr (TO == To::NOTHING) sum[r][c] = Vector{};
      else sum[r][c] = load((TO == To::ROW ? more : out + r * out_row) + c * LANES);
    }
  for (int64_t k = 0; k < depth; k++) {
    ahead.step();
    Vector line[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) line[c] = load(b + k * b_row + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      Vector x = broadcast(a.data[r * a.row + k * a.column]);
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sum[r][c] += x * line[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++)
      store(out + r * out_row + c * LANES,
            TO == To::NOTHING && more ? sum[r][c] * more[r] : sum[r][c]);
}

template <int R, To TO, int C = COLUMNS, class A>
inline void strip(Matrix a, const float* b, int64_t b_row, int64_t depth, float* out,
                  int64_t out_row, int64_t width, const float* more, A& ahead) {
  int64_t c = 0;
  auto columns = [&]<int N>() {
    for (; c + N * LANES <= width; c += N * LANES)
      tile<R, N, TO>(a, b + c, b_row, depth, out + c, out_row, TO == To::ROW ? more + c : more,
                     ahead);
  };
  columns.template operator()<C>();
  if constexpr (C > 2) columns.template operator()<2>();
  columns.template operator()<1>();
}

template <int R, To TO, class A>
inline void rest(int64_t rows, Matrix a, const float* b, int64_t b_row, int64_t depth, float* out,
                 int64_t out_row, int64_t width, const float* more, A& ahead) {
  if constexpr (R > 0) {
    if (rows == R) strip<R, TO>(a, b, b_row, depth, out, out_row, width, more, ahead);
    else rest<R - 1, TO>(rows, a, b, b_row, depth, out, out_row, width, more, ahead);
  }
}

// out = a b + what it is added to: `more` is that row, or a factor of each row of a b. The width
// is a multiple of LANES, and rows of b and of out have room for it.
template <To TO = To::NOTHING, class A = NothingAhead>
inline void product(int64_t rows, Matrix a, const float* b, int64_t b_row, int64_t depth,
                    float* out, int64_t out_row, int64_t width, const float* more = nullptr,
                    A ahead = {}) {
  if (width <= 2 * LANES)
    for (; rows >= TALL; rows -= TALL) {
      strip<TALL, TO, 2>(a, b, b_row, depth, out, out_row, width, more, ahead);
      a.data += TALL * a.row, out += TALL * out_row;
      if (TO == To::NOTHING && more) more += TALL;
    }
  for (; rows >= ROWS; rows -= ROWS) {
    strip<ROWS, TO>(a, b, b_row, depth, out, out_row, width, more, ahead);
    a.data += ROWS * a.row, out += ROWS * out_row;
    if (TO == To::NOTHING && more) more += ROWS;
  }
  rest<ROWS - 1, TO>(rows, a, b, b_row, depth, out, out_row, width, more, ahead);
}

}  // namespace
