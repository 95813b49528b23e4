// SPDX-License-Identifier: MIT
// The parts of lanczos that exist once per instruction level, with the same bits on all; see level.h.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

struct LanczosKernels {
  // coefficients[j] = vectors [count, n] row j . y
  void (*project)(const double* vectors, int64_t count, int64_t n, const double* y, double* coefficients);
  // y += sum over j of factor * coefficients[j] * row j of vectors [count, n]
  void (*add)(const double* vectors, int64_t count, int64_t n, double factor, const double* coefficients, double* y);
};

extern const LanczosKernels lanczos_portable;
#if defined(__x86_64__)
extern const LanczosKernels lanczos_avx2, lanczos_avx512;
#endif

}  // namespace namedmask::cpu
