// SPDX-License-Identifier: MIT
// The parts of normalized_rows that exist once per instruction level, with the same bits on all; see level.h.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

struct UnitRowKernels {
  double (*sum_of_squares)(const float* row, int64_t n);
  // out = row * factor, the product rounded to double, then to float.
  void (*scale)(const float* row, int64_t n, double factor, float* out);
};

extern const UnitRowKernels normalized_rows_portable;
#if defined(__x86_64__)
extern const UnitRowKernels normalized_rows_avx2, normalized_rows_avx512;
#endif

}  // namespace namedmask::cpu
