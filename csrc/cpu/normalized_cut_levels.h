// SPDX-License-Identifier: MIT
// The part of normalized_cut that exists once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "panel.h"

namespace namedmask::cpu {

struct CutKernels {
  // bits[r], bit j: dot(rows[r], token j of the two panels) > threshold, r < count. Products are added one after the
  // other, channel by channel, so a pair's bit depends on nothing but the pair.
  void (*connect)(const float* rows, int64_t count, const float* panels, int64_t channels, float threshold,
                  uint32_t* bits);
};

extern const CutKernels cut_portable;
#if defined(__x86_64__)
extern const CutKernels cut_avx2, cut_avx512;
#endif

}  // namespace namedmask::cpu
