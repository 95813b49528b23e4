// SPDX-License-Identifier: MIT
// The parts of normalized_rows that exist once per instruction level; all levels give the same bits. See level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

struct NormalizedRowsKernels {
  double (*sum_of_squares)(const float* row, int64_t n);
  // out = row * factor, the product rounded to double, then to float.
  void (*scale)(const float* row, int64_t n, double factor, float* out);
};

NMK_DECLARE_LEVELS(NormalizedRowsKernels, normalized_rows);

}  // namespace namedmask::cpu
