// SPDX-License-Identifier: MIT
// The parts of spectral_clusters that exist once per instruction level; see level.h. All but range() give the same bits
// on every level.
#pragma once

#include "panel.h"

namespace namedmask::cpu {

struct ClusterKernels {
  // Lowers range[0] and raises range[1] to the products of `count` rows (whole micro rows) with the kWord tokens of two
  // panels.
  void (*range)(const float* rows, int64_t count, const float* panels, int64_t channels, float* range);
  // sums [count, C] = x [count, n] times rows [n, C].
  void (*project)(const float* rows, int64_t n, int64_t channels, const double* x, int64_t count, double* sums);
  // out [count, n] = sums [count, C] times the rows' transpose.
  void (*expand)(const float* rows, int64_t n, int64_t channels, const double* sums, int64_t count, double* out);
  // label[i] = the centre [k, dims] nearest to point i of points [dims, n], of equals the first; its squared distance.
  void (*assign)(const double* points, int64_t n, int64_t dims, const double* centres, int64_t k, double* distance,
                 int64_t* label);
};

extern const ClusterKernels cluster_portable;
#if defined(__x86_64__)
extern const ClusterKernels cluster_avx2, cluster_avx512;
#endif

}  // namespace namedmask::cpu
