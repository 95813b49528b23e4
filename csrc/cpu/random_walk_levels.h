// SPDX-License-Identifier: MIT
// The parts of random_walk that exist once per instruction level; see level.h.
#pragma once

#include "level.h"
#include "panel.h"

namespace namedmask::cpu {

constexpr int64_t kWalkUnit = 8;  // the width of masks [tokens, width] is a multiple of this

struct WalkKernels {
  // weights [kBlock, kBlock] = exp(sharpness (rows . tokens of the panels - 1)), at least e^-60, for rows [kBlock, C]
  // and the first `columns` of kBlock tokens in panels, a multiple of kWord. `diagonal`: rows and columns are the same
  // tokens; rows beyond `columns` are then unspecified.
  void (*weigh)(const float* rows, const float* panels, int64_t channels, float sharpness, int64_t columns,
                bool diagonal, float* weights);
  // sums [kBlock, width] += weights [kBlock, columns] times masks [columns, width]. Meanwhile, weights [kBlock, kBlock]
  // at `next`, if not null, are fetched into the cache.
  void (*add)(const float* weights, int64_t columns, const float* masks, int64_t width, const float* next, float* sums);
  // sums [kBlock, width] += transposed weights times masks [kBlock, width]; rows beyond `columns` are unspecified.
  void (*add_transposed)(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums);
};

NMK_DECLARE_LEVELS(WalkKernels, random_walk);

}  // namespace namedmask::cpu
