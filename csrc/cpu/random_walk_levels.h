// SPDX-License-Identifier: MIT
// The parts of random_walk that exist once per instruction level; see level.h.
#pragma once

#include "panel.h"

namespace namedmask::cpu {

constexpr int64_t kWalkUnit = 32;  // floats; masks [tokens, width] have a width that is a multiple of this

struct WalkKernels {
  // weights [kBlock, kBlock] = exp(sharpness (rows . tokens of the panels - 1)); rows [kBlock, C], kBlock tokens in
  // panels.
  void (*weigh)(const float* rows, const float* panels, int64_t channels, float sharpness, float* weights);
  // sums [kBlock, width] += weights times masks [kBlock, width]; `turned`: the weights' transpose.
  void (*add)(const float* weights, bool turned, const float* masks, int64_t width, float* sums);
};

extern const WalkKernels walk_portable;
#if defined(__x86_64__)
extern const WalkKernels walk_avx2, walk_avx512;
#endif

}  // namespace namedmask::cpu
