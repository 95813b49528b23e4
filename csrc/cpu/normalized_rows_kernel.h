// SPDX-License-Identifier: MIT
// normalized_rows' inner loops, compiled once per instruction level; level.h describes the rules.
#include "normalized_rows_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

double sum_of_squares(const float* row, int64_t n) {
  Doubles8 lanes = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const Doubles8 part = load_widened(row + i);
    lanes = add_exact_product(part, part, lanes);
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += static_cast<double>(row[i]) * row[i];
  return sum_of_lanes(lanes);
}

void scale(const float* row, int64_t n, double factor, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store_narrowed(out + i, load_widened(row + i) * broadcast<Doubles8>(factor));
  for (; i < n; ++i) out[i] = static_cast<float>(row[i] * factor);
}

constexpr NormalizedRowsKernels kKernels = {sum_of_squares, scale};

}  // namespace
}  // namespace namedmask::cpu
