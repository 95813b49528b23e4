// SPDX-License-Identifier: MIT
// The parts of random_walk that exist once per instruction level; see level.h.
#pragma once

#include "level.h"
#include "panel.h"

namespace namedmask::cpu {

constexpr int64_t kWalkUnit = 32;  // floats; masks [tokens, width] have a width that is a multiple of this

struct WalkKernels {
  // weights [kBlock, kBlock] = exp(sharpness (rows . tokens of the panels - 1)); rows [kBlock, C], kBlock tokens in
  // panels. Only of the first `columns` tokens, a multiple of kWord. `diagonal`: rows and columns are the same tokens,
  // and rows beyond `columns` become anything.
  void (*weigh)(const float* rows, const float* panels, int64_t channels, float sharpness, int64_t columns,
                bool diagonal, float* weights);
  // sums [kBlock, width] += the weights of these columns times masks [columns, width].
  void (*add)(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums);
  // sums [kBlock, width] += the weights' transpose times masks [kBlock, width]; rows beyond `columns` become anything.
  void (*add_transposed)(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums);
};

NMK_DECLARE_LEVELS(WalkKernels, random_walk);

}  // namespace namedmask::cpu
