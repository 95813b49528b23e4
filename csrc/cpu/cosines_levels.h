// SPDX-License-Identifier: MIT
// The parts of cosines that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "panel.h"

namespace namedmask::cpu {

struct CosineKernels {
  // bits[r], bit j: dot(rows[r], token j of the two panels) > threshold, r < count. Products are added one after the
  // other, channel by channel, so a pair's bit depends on nothing but the pair.
  void (*connect)(const float* rows, int64_t count, const float* panels, int64_t channels, float threshold,
                  uint32_t* bits);

  // The same from unit vectors times kUnit, rounded to 16 bits, on CPUs that multiply these twice as fast; null on
  // others. Channels are padded to an even number of them.

  // Returns the squared distance of kUnit * row from what was written.
  double (*quantise)(const float* row, int64_t channels, int16_t* out);
  // bits: the integer product exceeds `high`; unsure: it is in [low, high], so that the floats must tell.
  // panels [pairs of channels, kPanel, 2].
  void (*connect_quantised)(const int16_t* rows, int64_t count, const int16_t* panels, int64_t channels, int32_t low,
                            int32_t high, uint32_t* bits, uint32_t* unsure);
  float (*dot)(const float* a, const float* b, int64_t channels);
};

constexpr float kUnit = 32767;  // products of two such vectors, and all their partial sums, fit 32 bits

extern const CosineKernels cosines_portable;
#if defined(__x86_64__)
extern const CosineKernels cosines_avx2, cosines_avx512, cosines_avx512_vnni;
#endif

}  // namespace namedmask::cpu
