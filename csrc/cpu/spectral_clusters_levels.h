// SPDX-License-Identifier: MIT
// The parts of spectral_clusters that exist once per instruction level; all levels give the same bits. See level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

struct ClusterKernels {
  double (*cosine)(const float* a, const float* b, int64_t channels);
  // sums [count, C] = x [count, n], whose rows are `stride` apart, times rows [n, C].
  void (*project)(const float* rows, int64_t n, int64_t channels, const double* x, int64_t count, int64_t stride,
                  double* sums);
  // out [count, n], whose rows are `stride` apart, = sums [count, C] times the rows' transpose.
  void (*expand)(const float* rows, int64_t n, int64_t channels, const double* sums, int64_t count, double* out,
                 int64_t stride);
  // label[i], distance[i] = index and squared distance of the center [k, dims] nearest to point i of points [dims, n],
  // the first among equals.
  void (*assign)(const double* points, int64_t n, int64_t dims, const double* centers, int64_t k, double* distance,
                 int64_t* label);
  // sums [k, dims] = the sums of the points with each label, sizes [k] = their numbers.
  void (*add_up)(const double* points, int64_t n, int64_t dims, const int64_t* label, int64_t k, double* sums,
                 int64_t* sizes);
};

NMK_DECLARE_LEVELS(ClusterKernels, spectral_clusters);

}  // namespace namedmask::cpu
