// SPDX-License-Identifier: MIT
// lanczos' inner loops, compiled once per instruction level; level.h describes the rules.
#include "lanczos_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

constexpr int64_t kVectorsAtOnce = 4;  // vectors that share the reads of y

void project(const double* vectors, int64_t count, int64_t n, const double* y, double* coefficients) {
  for (int64_t j = 0; j < count; j += kVectorsAtOnce) {
    const int64_t here = count - j < kVectorsAtOnce ? count - j : kVectorsAtOnce;
    const double* row[kVectorsAtOnce];
    for (int64_t v = 0; v < kVectorsAtOnce; ++v) row[v] = vectors + (j + (v < here ? v : 0)) * n;
    Doubles8 sums[kVectorsAtOnce] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const Doubles8 part = load<Doubles8>(y + i);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectorsAtOnce; ++v) sums[v] += load<Doubles8>(row[v] + i) * part;
    }
    for (int64_t l = 0; i < n; ++i, ++l) {
      for (int64_t v = 0; v < kVectorsAtOnce; ++v) sums[v][l] += row[v][i] * y[i];
    }
    for (int64_t v = 0; v < here; ++v) coefficients[j + v] = sum_of_lanes(sums[v]);
  }
}

void add(const double* vectors, int64_t count, int64_t n, double factor, const double* coefficients, double* y) {
  for (int64_t j = 0; j < count; j += kVectorsAtOnce) {
    const int64_t here = count - j < kVectorsAtOnce ? count - j : kVectorsAtOnce;
    const double* row[kVectorsAtOnce];
    double weight[kVectorsAtOnce];
    for (int64_t v = 0; v < kVectorsAtOnce; ++v) {
      row[v] = vectors + (j + (v < here ? v : 0)) * n;
      weight[v] = v < here ? factor * coefficients[j + v] : 0;
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      Doubles8 sum = load<Doubles8>(y + i);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectorsAtOnce; ++v) sum += weight[v] * load<Doubles8>(row[v] + i);
      store(y + i, sum);
    }
    for (; i < n; ++i) {
      for (int64_t v = 0; v < kVectorsAtOnce; ++v) y[i] += weight[v] * row[v][i];
    }
  }
}

constexpr LanczosKernels kKernels = {project, add};

}  // namespace
}  // namespace namedmask::cpu
