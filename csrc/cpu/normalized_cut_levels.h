// SPDX-License-Identifier: MIT
// The parts of normalized_cut that exist once per instruction level; all levels give the same bits. See level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

struct CutKernels {
  // sums[i] += the sum of x[j] where bit j of words[i] is set, i < n. x [32].
  void (*add_selected)(const uint32_t* words, int64_t n, const double* x, double* sums);
};

NMK_DECLARE_LEVELS(CutKernels, normalized_cut);

}  // namespace namedmask::cpu
