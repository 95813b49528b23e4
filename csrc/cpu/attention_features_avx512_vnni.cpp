// SPDX-License-Identifier: MIT
// bfloat16 scores from products of 16-bit integers (vpdpwssd), which run at twice the rate of float32 and are summed
// exactly.
//
// A query or key is stored as integer multiples of a power of two that brings its norm below 2^15, so that no sum of
// products overflows 32 bits (Cauchy-Schwarz). bfloat16 has 8 significant bits: elements down to 2^-7 of the norm are
// exact, and smaller ones are off by at most half a unit, which changes a score by about 10^-5 |q| |k| scale. Weights
// and values stay float32, which preserves small weights beside a large one.
#include "attention_features_kernel.h"

namespace namedmask::cpu {
namespace {

inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
inline float power(int exponent) { return __builtin_bit_cast(float, (exponent + 127) << 23); }  // 2^exponent
inline int exponent_of(float x) { return (bits_of(x) >> 23 & 255) - 127; }

struct FixedScores {
  // Two elements per word; an odd dim is padded with a zero.
  static int64_t query_words(int64_t dim) { return (dim + 1) / 2; }

  // Writes the row as integers; returns their unit: 0 for a row of zeros, NaN for a row with NaN or Inf.
  static float fix(const AttentionHead& head, int64_t token, int64_t which, int32_t* words) {
    float row[kMaxDim + 1];
    const int64_t dim = head.dim;
    read(head.qkv, head.stored, element(head, token, which), dim, 1.0f, row);
    row[dim] = 0;
    int32_t largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const int32_t size = bits_of(row[d]) & 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    const float most = __builtin_bit_cast(float, largest);
    const bool usable = most >= 0x1p-100f && most < __builtin_inff();  // NaN is not
    if (!usable) {
      for (int64_t i = 0; i < query_words(dim); ++i) words[i] = 0;
      return most < 0x1p-100f ? 0.0f : __builtin_nanf("");
    }
    const int exponent = exponent_of(most) < 126 ? exponent_of(most) : 126;
    float squares = 0;  // at least 1, at most 16 * dim
    for (int64_t d = 0; d < dim; ++d) {
      row[d] *= power(-exponent);
      squares += row[d] * row[d];
    }
    const int shift = 15 - (exponent_of(squares) + 2) / 2;  // norm * 2^shift < 2^15
    const float factor = power(shift);
    for (int64_t i = 0; i < query_words(dim); ++i) {
      const int32_t low = bits_of(row[2 * i] * factor + kRoundingBias),
                    high = bits_of(row[2 * i + 1] * factor + kRoundingBias);
      words[i] = (low & 0xffff) | high << 16;
    }
    return power(exponent - shift);
  }

  static void pack_query(const AttentionHead& head, int64_t token, float* words, float* factor) {
    *factor = head.scale * kLog2E * fix(head, token, 0, reinterpret_cast<int32_t*>(words));
  }

  static void pack_keys(const AttentionHead& head, int64_t first, int64_t count, float* words, float* factors) {
    int32_t rows[kColumns][kMaxDim];
    for (int64_t k = 0; k < kKeys; k += kColumns) {
      for (int64_t i = 0; i < kColumns; ++i) {
        const bool there = k + i < count;
        factors[k + i] = there ? fix(head, first + k + i, 1, rows[i]) : 0;
        for (int64_t w = 0; !there && w < query_words(head.dim); ++w) rows[i][w] = 0;
      }
      transpose(rows, query_words(head.dim), reinterpret_cast<int32_t*>(words) + k);
    }
  }

  static void score(const float* queries, const float* query_units, const float* keys, const float* key_units,
                    int64_t dim, int64_t count, float* scores, int64_t stride) {
    const int64_t words = query_words(dim);
    const auto* q = reinterpret_cast<const int32_t*>(queries);
    const auto* columns = reinterpret_cast<const int32_t*>(keys);
    for (int64_t k = 0; k < count; k += kVectors * kLanes) {
      Ints sums[kRows][kVectors] = {};
      for (int64_t w = 0; w < words; ++w) {
        __m512i b[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) b[v] = _mm512_load_si512(columns + w * kKeys + k + v * kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
          const __m512i pair = _mm512_set1_epi32(q[i * words + w]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[i][v] = (Ints)_mm512_dpwssd_epi32((__m512i)sums[i][v], pair, b[v]);
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const Floats units = broadcast(query_units[i]) * load(key_units + k + v * kLanes);
          store(scores + i * stride + k + v * kLanes, _mm512_maskz_cvtepi32_ps(0xffff, (__m512i)sums[i][v]) * units);
        }
      }
    }
  }
};

}  // namespace

const AttentionKernels attention_features_avx512_vnni = BFloat16Kernels<FixedScores, FloatWeights>::kKernels;

}  // namespace namedmask::cpu
