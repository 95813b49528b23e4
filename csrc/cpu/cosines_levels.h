// SPDX-License-Identifier: MIT
// The parts of cosines that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"
#include "panel.h"

namespace namedmask::cpu {

// Tokens less a vector near their mean, so that 8 bits tell even tokens that are much alike apart: (token - center) /
// unit, rounded, for the unit that makes the largest entry 127.
struct Bytes {
  float* center;                            // [C]
  int8_t* rows;                             // [tokens, groups of channels, kByteGroup]
  uint8_t* panels;                          // [panels, groups, kPanel, kByteGroup], plus 128
  int32_t* sums;                            // of each row's entries, for what the 128 add to products
  float *units, *lengths, *along, *errors;  // of token - center: length, product with center, distance from unit * row
};

constexpr int64_t kByteGroup = 4;  // channels are padded to whole groups

struct CosineKernels {
  // bits[r], bit j: dot(rows[r], token j of the two panels) > threshold, r < count. Products are added one after the
  // other, channel by channel, so a pair's bit depends on nothing but the pair.
  void (*connect)(const float* rows, int64_t count, const float* panels, int64_t channels, float threshold,
                  uint32_t* bits);

  // The same from unit vectors times kUnit, rounded to 16 bits, on CPUs that multiply these twice as fast; null on
  // others. Channels are padded to an even number of them.

  // Returns the squared distance of kUnit * row from what was written.
  double (*quantize)(const float* row, int64_t channels, int16_t* out);
  // bits: the integer product exceeds `high`; unsure: it is in [low, high], so that the floats must tell.
  // panels [pairs of channels, kPanel, 2].
  void (*connect_quantized)(const int16_t* rows, int64_t count, const int16_t* panels, int64_t channels, int32_t low,
                            int32_t high, uint32_t* bits, uint32_t* unsure);
  float (*dot)(const float* a, const float* b, int64_t channels);

  // From 8 bits, twice as fast once more, for a coarse answer. Writes token i.
  void (*quantize_bytes)(const float* row, int64_t channels, int64_t i, const Bytes& bytes);
  // bits[r], bit j: the cosine of tokens row + r and column + j less the center's square can be below `bound`.
  void (*maybe_below_bytes)(const Bytes& bytes, int64_t row, int64_t count, int64_t column, int64_t channels,
                            float bound, uint32_t* bits);
};

constexpr float kUnit = 32767;  // products of two such vectors, and all their partial sums, fit 32 bits

NMK_DECLARE_LEVELS(CosineKernels, cosines);

}  // namespace namedmask::cpu
