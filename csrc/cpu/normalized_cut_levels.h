// SPDX-License-Identifier: MIT
// The part of normalized_cut that exists once per instruction level; see level.h.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

constexpr int64_t kPanel = 16;      // tokens that stand side by side in a panel [C, kPanel]
constexpr int64_t kWord = 32;       // tokens (two panels) that share a word of bits
constexpr int64_t kMicroRows = 12;  // rows come in multiples of this

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
