// SPDX-License-Identifier: MIT
// The parts of lanczos that exist once per instruction level; all levels give the same bits. See level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

struct LanczosKernels {
  // coefficients[j] = vectors [count, n] row j . y
  void (*project)(const double* vectors, int64_t count, int64_t n, const double* y, double* coefficients);
  // y += sum over j of factor * coefficients[j] * row j of vectors [count, n]
  void (*add)(const double* vectors, int64_t count, int64_t n, double factor, const double* coefficients, double* y);
};

NMK_DECLARE_LEVELS(LanczosKernels, lanczos);

}  // namespace namedmask::cpu
