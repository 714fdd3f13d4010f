// Kernels for processors, float32 without gradients: built and called by ../compiled.py, which
// tells what they take.

#include <torch/library.h>

#include "attention.h"
#include "clustered.h"
#include "clusters.h"
#include "points.h"
#include "sketch.h"

TORCH_LIBRARY(fna_lab_cpu, m) {
  m.def("attend_few(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
  m.def("attend_to_few(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
  m.def(
      "clustered_ridge(Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor members, "
      "Tensor? rows, Tensor? keys, float scale, float ridge, int exact_rows, Tensor? apart, "
      "Tensor? valid, bool own, bool sunk) -> Tensor");
  m.def("means(Tensor x, Tensor members, int num) -> (Tensor, Tensor)");
  m.def("sketch_points(Tensor points, Tensor draw) -> Tensor");
  m.def("nearest(Tensor points, Tensor landmarks, Tensor? allowed) -> Tensor");
  m.def(
      "farthest_points(Tensor points, int num, Tensor first, Tensor? allowed, bool in_place) -> "
      "Tensor");
  m.def(
      "spread_points(Tensor points, int num, Tensor first, Tensor? allowed, int[] counts, "
      "int runs, bool plenty) -> Tensor");
  m.def(
      "before_solve(Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor members, Tensor rows, "
      "Tensor? keys, float scale, bool alone, Tensor? sunk_rows, Tensor? sunk_valid) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "after_solve(Tensor q, Tensor means, Tensor values, Tensor sizes, float scale, Tensor rows, "
      "Tensor exact, int exact_rows, Tensor k, Tensor v, Tensor? own_rows, Tensor? own_valid, "
      "Tensor? home) -> Tensor");
}

TORCH_LIBRARY_IMPL(fna_lab_cpu, CPU, m) {
  m.impl("attend_few", &attend_few);
  m.impl("attend_to_few", &attend_to_few);
  m.impl("clustered_ridge", &clustered_ridge);
  m.impl("means", &means);
  m.impl("sketch_points", &sketch_points);
  m.impl("nearest", &nearest);
  m.impl("farthest_points", &farthest_points);
  m.impl("spread_points", &spread_points);
  m.impl("before_solve", &before_solve);
  m.impl("after_solve", &after_solve);
}
