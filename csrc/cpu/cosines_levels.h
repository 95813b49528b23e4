// SPDX-License-Identifier: MIT
// The parts of cosines that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"
#include "panel.h"

namespace namedmask::cpu {

// Tokens minus a vector near their mean, so that 8 bits distinguish even very similar tokens: (token - center) / unit,
// rounded, where unit makes the largest entry 127.
struct Bytes {
  float* center;                            // [C]
  int8_t* rows;                             // [tokens, groups of channels, kByteGroup]
  uint8_t* panels;                          // [panels, groups, kPanel, kByteGroup], plus 128
  int32_t* sums;                            // of each row's entries, to correct for the 128
  float *units, *lengths, *along, *errors;  // of token - center: length, product with center, distance from unit * row
};

constexpr int64_t kByteGroup = 4;  // channels are padded to a multiple of this

struct CosineKernels {
  // bits[r], bit j: dot(rows[r], token j of the two panels) > threshold, r < count. Products are added in the order of
  // channels, so a pair's bit depends only on the pair.
  void (*connect)(const float* rows, int64_t count, const float* panels, int64_t channels, float threshold,
                  uint32_t* bits);

  // The functions below exist only on CPUs with fast integer products; elsewhere they are null. Where they write words
  // `unsure`, these are the pairs for which more exact products must decide.

  // Unit vectors times kUnit, rounded to 16 bits. Channels are padded to an even number. Returns the squared distance
  // between kUnit * row and the rounded row.
  double (*quantize)(const float* row, int64_t channels, int16_t* out);
  // bits: the integer product exceeds `high`; unsure: it is in [low, high]. panels [pairs of channels, kPanel, 2].
  void (*connect_quantized)(const int16_t* rows, int64_t count, const int16_t* panels, int64_t channels, int32_t low,
                            int32_t high, uint32_t* bits, uint32_t* unsure);
  float (*dot)(const float* a, const float* b, int64_t channels);

  // From 8 bits, twice as fast again, for a coarse answer. Writes token i.
  void (*quantize_bytes)(const float* row, int64_t channels, int64_t i, const Bytes& bytes);
  // bits[r], bit j: the cosine of tokens row + r and column + j minus |center|^2 certainly exceeds `high`; unsure: it
  // does not, but may be at least `low`.
  void (*compare_bytes)(const Bytes& bytes, int64_t row, int64_t count, int64_t column, int64_t channels, float low,
                        float high, uint32_t* bits, uint32_t* unsure);
  // Decides the pairs in unsure [words, kBlock] one by one, as connect_quantized: sets those in bits[word * stride + r]
  // that exceed `high`, and leaves those in [low, high] unsure. columns [words * kWord, padded channels].
  void (*decide)(const int16_t* rows, int64_t count, const int16_t* columns, int64_t words, int64_t channels,
                 int32_t low, int32_t high, uint32_t* unsure, uint32_t* bits, int64_t stride);
};

constexpr int64_t kTileWords = 8;  // the most words of columns that are decided at once

constexpr float kUnit = 32767;  // products of two such vectors and all partial sums fit 32 bits

NMK_DECLARE_LEVELS(CosineKernels, cosines);

}  // namespace namedmask::cpu
