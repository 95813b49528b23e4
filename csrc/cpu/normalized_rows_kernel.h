// SPDX-License-Identifier: MIT
// normalized_rows' inner loops, included by one file per instruction level; level.h says what is allowed here.
#include "doubles.h"
#include "normalized_rows_levels.h"

namespace namedmask::cpu {
namespace {

double sum_of_squares(const float* row, int64_t n) {
  W lanes = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const W part = widen(row + i);
    lanes = add_exact_product(part, part, lanes);
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += static_cast<double>(row[i]) * row[i];
  return fold(lanes);
}

void scale(const float* row, int64_t n, double factor, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) write_floats(out + i, widen(row + i) * spread(factor));
  for (; i < n; ++i) out[i] = static_cast<float>(row[i] * factor);
}

constexpr NormalizedRowsKernels kKernels = {sum_of_squares, scale};

}  // namespace
}  // namespace namedmask::cpu
