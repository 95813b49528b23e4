// SPDX-License-Identifier: MIT
// bfloat16 inputs by vdpbf16ps, which multiplies pairs of bfloat16 numbers and adds them to a float32 sum.
//
// Queries, keys and values are used as they are. Weights are rounded to bfloat16: each is off by at most 2^-8 of
// itself, and the output stays a weighted mean of the values, because the rounded weights are what it is divided by.
// The log-sum-exp uses the weights before rounding. The instruction takes numbers below 2^-126 as 0.
#include "attention_features_kernel.h"

namespace namedmask::cpu {
namespace {

inline Floats add_products(Floats sum, __m512i a, __m512i b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// sums[i][v] += pairs of row i of a times pairs of vector v of b, for `depth` pairs. A row of a has a_stride words, b
// b_stride words from one pair to the next.
template <int kWide>
inline __attribute__((always_inline)) void multiply_add_pairs(Floats (&sums)[kRows][kWide], const int32_t* a,
                                                              int64_t a_stride, const int32_t* b, int64_t b_stride,
                                                              int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    __m512i columns[kWide];
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) columns[v] = _mm512_loadu_si512(b + k * b_stride + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512i pair = _mm512_set1_epi32(a[i * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) sums[i][v] = add_products(sums[i][v], pair, columns[v]);
    }
  }
}

inline const uint16_t* halves_of(const AttentionHead& head, int64_t token, int64_t which) {
  return static_cast<const uint16_t*>(head.qkv) + element(head, token, which);
}

struct PairScores {
  // Two elements per word; an odd dim is padded with a zero.
  static int64_t query_words(int64_t dim) { return (dim + 1) / 2; }

  static void copy(const AttentionHead& head, int64_t token, int64_t which, int32_t* words) {
    words[head.dim / 2] = 0;
    __builtin_memcpy(words, halves_of(head, token, which), 2 * head.dim);
  }

  static void pack_query(const AttentionHead& head, int64_t token, float* words, float* factor) {
    copy(head, token, 0, reinterpret_cast<int32_t*>(words));
    *factor = head.scale * kLog2E;
  }

  static void pack_keys(const AttentionHead& head, int64_t first, int64_t count, float* words, float*) {
    int32_t rows[kColumns][kMaxDim];
    for (int64_t k = 0; k < kKeys; k += kColumns) {
      for (int64_t i = 0; i < kColumns; ++i) {
        if (k + i < count) {
          copy(head, first + k + i, 1, rows[i]);
        } else {
          for (int64_t w = 0; w < query_words(head.dim); ++w) rows[i][w] = 0;
        }
      }
      transpose(rows, query_words(head.dim), reinterpret_cast<int32_t*>(words) + k);
    }
  }

  static void score(const float* queries, const float* factors, const float* keys, const float*, int64_t dim,
                    int64_t count, float* scores, int64_t stride) {
    const int64_t words = query_words(dim);
    for (int64_t k = 0; k < count; k += kVectors * kLanes) {
      Floats sums[kRows][kVectors] = {};
      multiply_add_pairs(sums, reinterpret_cast<const int32_t*>(queries), words,
                         reinterpret_cast<const int32_t*>(keys) + k, kKeys, words);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(scores + i * stride + k + v * kLanes, sums[i][v] * factors[i]);
      }
    }
  }
};

struct PairWeights {
  static constexpr int kTotals = 2;  // of the weights, and of the rounded weights
  static constexpr int32_t kOnes = 0x3f803f80;

  // The reference of the weights follows the largest score so far at a distance of at most this: most blocks then
  // require neither a new reference nor a search for the largest score.
  static constexpr float kLead = 8;

  // Words [kKeys / 2, width] of two keys' values; an odd last key is paired with zeros.
  static void pack_values(const AttentionHead& head, int64_t first, int64_t count, float* out) {
    const int64_t width = width_of(head.dim);
    auto* words = reinterpret_cast<uint32_t*>(out);
    for (int64_t k = 0; k < count; k += 2, words += width) {
      const uint16_t *low = halves_of(head, first + k, 2), *high = halves_of(head, first + k + 1, 2);
      if (k + 1 < count) {
        for (int64_t d = 0; d < head.dim; ++d) words[d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
      } else {
        for (int64_t d = 0; d < head.dim; ++d) words[d] = low[d];
      }
      for (int64_t d = head.dim; d < width; ++d) words[d] = 0;
    }
  }

  // Writes the weights of kRows queries for a block without a detour of their scores through memory: an AMD EPYC does
  // not overlap stores with multiply-adds. The same bits as score() and soften(), but without the total of the weights
  // before rounding. False if a reference must change; then the totals are untouched.
  static bool weigh(const float* queries, const float* factors, const float* keys, int64_t dim, int64_t count,
                    const float* largest, float* weights, float* totals) {
    constexpr int64_t kTogether = 2 * kLanes;
    const int64_t words = PairScores::query_words(dim);
    for (int64_t k = 0; k < count; k += kTogether) {
      Floats x[kRows][2] = {};  // scores minus references
      multiply_add_pairs(x, reinterpret_cast<const int32_t*>(queries), words,
                         reinterpret_cast<const int32_t*>(keys) + k, kKeys, words);
      __m512i most = _mm512_setzero_si512();  // positive floats are ordered like integers
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          x[i][v] = x[i][v] * factors[i] - largest[i];
          // a mask as in simd.h
          most = _mm512_maskz_max_epi32(0xffff, most, (__m512i)x[i][v]);
        }
      }
      if (_mm512_cmpgt_epi32_mask(most, (__m512i)broadcast(kLead))) return false;
      const auto there = static_cast<uint32_t>(count - k < kTogether ? (uint64_t{1} << (count - k)) - 1 : ~0u);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512 low = (__m512)power_of_two(x[i][0]), high = (__m512)power_of_two(x[i][1]);
        const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(weights + i * kKeys + k / 2, _mm512_maskz_mov_epi16(there, pairs));
      }
    }
    const __m512i ones = _mm512_set1_epi32(kOnes);
    for (int i = 0; i < kRows; ++i) {
      float* rounded = totals + (i * kTotals + 1) * kLanes;
      Floats sum = load(rounded);
      for (int64_t k = 0; k < count; k += kTogether) {
        sum = add_products(sum, _mm512_loadu_si512(weights + i * kKeys + k / 2), ones);
      }
      store(rounded, sum);
    }
    return true;
  }

  // Replaces scores by weights in bfloat16, 2^(score - reference).
  static void soften(float* scores, int64_t count, float* largest, float* totals, float* decay) {
    for (int64_t k = count; k % (2 * kLanes); ++k) scores[k] = -__builtin_inff();
    Floats most = load(scores);
    for (int64_t k = kLanes; k < count; k += kLanes) most = larger(most, load(scores + k));
    *decay = 1;
    const Floats before = broadcast(*largest);
    if (above(most - before, broadcast(kLead))) {
      const Floats now = larger(before, largest_lane(most));
      const Floats fade = power_of_two(before - now);
      store(totals, load(totals) * fade);
      store(totals + kLanes, load(totals + kLanes) * fade);
      *largest = now[0];
      *decay = fade[0];
    }
    const Floats reference = broadcast(*largest);
    const __m512i ones = _mm512_set1_epi32(kOnes);
    Floats sum = load(totals), rounded = load(totals + kLanes);
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      const Floats low = power_of_two(load(scores + k) - reference),
                   high = power_of_two(load(scores + k + kLanes) - reference);
      const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      _mm512_storeu_si512(scores + k / 2, pairs);
      sum += low + high;
      rounded = add_products(rounded, pairs, ones);
    }
    store(totals, sum);
    store(totals + kLanes, rounded);
  }

  template <int kWide>
  static void accumulate(const float* weights, const float* values, int64_t count, const float* decay, int64_t width,
                         int64_t column, float* sums) {
    Floats block[kRows][kWide] = {};
    multiply_add_pairs(block, reinterpret_cast<const int32_t*>(weights), kKeys,
                       reinterpret_cast<const int32_t*>(values) + column, width, (count + 1) / 2);
    add_block(block, decay, width, column, sums);
  }
};

}  // namespace

const AttentionKernels attention_features_avx512_bf16 = BFloat16Kernels<PairScores, PairWeights>::kKernels;

}  // namespace namedmask::cpu
