// SPDX-License-Identifier: MIT
// The parts of unit_rows that exist once per instruction level, with the same bits on all; see level.h.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

struct UnitRowKernels {
  double (*sum_of_squares)(const float* row, int64_t n);
  // out = row * factor, the product rounded to double, then to float.
  void (*scale)(const float* row, int64_t n, double factor, float* out);
};

extern const UnitRowKernels unit_rows_portable;
#if defined(__x86_64__)
extern const UnitRowKernels unit_rows_avx2, unit_rows_avx512;
#endif

}  // namespace namedmask::cpu
