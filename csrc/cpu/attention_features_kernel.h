// SPDX-License-Identifier: MIT
// attention_features' inner loops, compiled once per instruction level; level.h describes the rules.
//
// Blocks of kQueries queries pass over all keys, in blocks of kKeys in order (flash attention). Keys and values are
// packed once per head, transposed into the layout of the inner loops; values in float32 for every input type.
#include "attention_features_levels.h"
#include "exponential.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

static_assert(kQueries % kRows == 0 && kTapRows % kRows == 0 && kKeys % (kVectors * kLanes) == 0);

// Scores are in units of log2(e), so that weights are powers of two.
constexpr float kLn2 = 0.693147181f;

// -- input types, written so that the compiler vectorizes them ------------------------------------------------

inline float from_bfloat16(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : rounded);
}

inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t u = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) * 0x1p112f);
  return __builtin_bit_cast(float, u | sign | (rest >= 0x0f800000 ? 0x7f800000 : 0));
}

inline uint16_t to_float16(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x), size = u & 0x7fffffff;
  const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;  // rounds to Inf by itself
  const uint32_t small = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - 0x3f000000;
  const uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t h = size >= 0x47800000 ? large : size < 0x38800000 ? small : normal;
  return static_cast<uint16_t>(h | (u >> 16 & 0x8000));
}

// out[i] = factor * element `at + i`, i < n
inline void read(const void* data, Stored stored, int64_t at, int64_t n, float factor, float* out) {
  const auto* floats = static_cast<const float*>(data) + at;
  const auto* halves = static_cast<const uint16_t*>(data) + at;
  if (stored == Stored::kFloat32) {
    for (int64_t i = 0; i < n; ++i) out[i] = factor * floats[i];
  } else if (stored == Stored::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = factor * from_bfloat16(halves[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = factor * from_float16(halves[i]);
  }
}

inline void write(const float* in, float factor, Stored stored, int64_t at, int64_t n, void* data) {
  auto* floats = static_cast<float*>(data) + at;
  auto* halves = static_cast<uint16_t*>(data) + at;
  if (stored == Stored::kFloat32) {
    for (int64_t i = 0; i < n; ++i) floats[i] = factor * in[i];
  } else if (stored == Stored::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = to_bfloat16(factor * in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) halves[i] = to_float16(factor * in[i]);
  }
}

// -- blocks ----------------------------------------------------------------------------------------------------------

inline int64_t element(const AttentionHead& head, int64_t token, int64_t which) {
  return (3 * token + which) * head.heads * head.dim;
}

// Transposes rows [kColumns, n] of 32-bit words into out[i * kKeys + k], k < kColumns.
constexpr int64_t kColumns = 16;  // so that whole cache lines are written

template <class Word>
inline void transpose(const Word (*rows)[kMaxDim], int64_t n, Word* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < kColumns; ++k) out[i * kKeys + k] = rows[k][i];
  }
}

// Scores in float32: queries [kRows, dim], multiplied by scale, times keys transposed to [dim, kKeys].
struct FloatScores {
  static int64_t query_words(int64_t dim) { return dim; }

  static void pack_query(const AttentionHead& head, int64_t token, float* words, float*) {
    read(head.qkv, head.stored, element(head, token, 0), head.dim, head.scale * kLog2E, words);
  }

  static void pack_keys(const AttentionHead& head, int64_t first, int64_t count, float* words, float*) {
    float rows[kColumns][kMaxDim];
    for (int64_t k = 0; k < kKeys; k += kColumns) {
      for (int64_t i = 0; i < kColumns; ++i) {
        if (k + i < count) {
          read(head.qkv, head.stored, element(head, first + k + i, 1), head.dim, 1.0f, rows[i]);
        } else {
          for (int64_t d = 0; d < head.dim; ++d) rows[i][d] = 0;
        }
      }
      transpose(rows, head.dim, words + k);
    }
  }

  // scores[i * stride + k] for kRows queries and the first `count` keys of a block, rounded up to whole vectors.
  static void score(const float* queries, const float*, const float* keys, const float*, int64_t dim, int64_t count,
                    float* scores, int64_t stride) {
    for (int64_t k = 0; k < count; k += kVectors * kLanes) {
      Floats sums[kRows][kVectors] = {};
      multiply_add(sums, queries, dim, 1, [=](int v) { return keys + k + v * kLanes; }, kKeys, dim);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) store(scores + i * stride + k + v * kLanes, sums[i][v]);
      }
    }
  }
};

inline int64_t width_of(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// sums [kRows, width] = decay[i] * sums + block, for kWide vectors from `column` on; decay is 1 if null.
template <int kWide>
inline void add_block(const Floats (&block)[kRows][kWide], const float* decay, int64_t width, int64_t column,
                      float* sums) {
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* row = sums + i * width + column;
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      const Floats before = load(row + v * kLanes);
      store(row + v * kLanes, decay ? fma(broadcast(decay[i]), before, block[i][v]) : before + block[i][v]);
    }
  }
}

// A block of values and the weights of kRows queries for them. Scores become weights in place.
struct FloatWeights {
  static constexpr int kTotals = 1;  // vectors of totals per query, whose lanes add up to the sum of its weights

  // Values [kKeys, width] in float32, zero beyond dim.
  static void pack_values(const AttentionHead& head, int64_t first, int64_t count, float* out) {
    const int64_t width = width_of(head.dim);
    for (int64_t k = 0; k < count; ++k, out += width) {
      read(head.qkv, head.stored, element(head, first + k, 2), head.dim, 1.0f, out);
      for (int64_t d = head.dim; d < width; ++d) out[d] = 0;
    }
  }

  static bool weigh(const float*, const float*, const float*, int64_t, int64_t, const float*, float*, float*) {
    return false;  // only by way of scores in memory
  }

  // Replaces `count` scores of a row by weights 2^(score - largest so far). Earlier sums must be multiplied by `decay`.
  static void soften(float* scores, int64_t count, float* largest, float* totals, float* decay) {
    for (int64_t k = count; k % kLanes; ++k) scores[k] = -__builtin_inff();
    Floats most = load(scores);
    for (int64_t k = kLanes; k < count; k += kLanes) most = larger(most, load(scores + k));
    const Floats before = broadcast(*largest), now = larger(before, largest_lane(most));
    Floats sum = {};
    for (int64_t k = 0; k < count; k += kLanes) {
      const Floats weight = power_of_two(load(scores + k) - now);
      store(scores + k, weight);
      sum += weight;
    }
    const Floats fade = power_of_two(before - now);
    store(totals, fma(load(totals), fade, sum));
    *largest = now[0];
    *decay = fade[0];
  }

  // sums [kRows, width] = decay[i] * sums + weights [kRows, kKeys] * values, for kWide vectors from `column` on. The
  // block is summed separately first, which rounds less than one long sum over all keys.
  template <int kWide>
  static void accumulate(const float* weights, const float* values, int64_t count, const float* decay, int64_t width,
                         int64_t column, float* sums) {
    Floats block[kRows][kWide] = {};
    multiply_add(block, weights, kKeys, 1, [=](int v) { return values + column + v * kLanes; }, width, count);
    add_block(block, decay, width, column, sums);
  }
};

// A block of keys and values in the layout of `attend`: words [words of a query, kKeys], factors [kKeys], values. Keys
// beyond the last have score 0 and no values.
template <class Scores, class Weights>
void pack(const AttentionHead& head, int64_t first, bool with_values, float* block) {
  const int64_t count = head.count - first < kKeys ? head.count - first : kKeys;
  float* factors = block + kKeys * Scores::query_words(head.dim);
  Scores::pack_keys(head, first, count, block, factors);
  if (with_values) Weights::pack_values(head, first, count, factors + kKeys);
}

template <class Scores, class Weights>
void attend(const AttentionHead& head, const float* packed, int64_t begin, int64_t end, void* output, float* lse) {
  const int64_t dim = head.dim, width = width_of(dim), words = Scores::query_words(dim);
  const int64_t rows = (end - begin + kRows - 1) / kRows * kRows;
  constexpr int kTotals = Weights::kTotals * kLanes;
  float* queries = head.scratch;
  float* factors = queries + kQueries * kMaxDim;
  float* sums = factors + kQueries;
  float* weights = sums + kQueries * kMaxDim;
  float* totals = weights + kTapRows * kKeys;
  float* largest = totals + kQueries * kTotals;
  for (int64_t i = 0; i < rows; ++i) {  // rows beyond the last query repeat it
    Scores::pack_query(head, begin + i < end ? begin + i : end - 1, queries + i * words, factors + i);
    largest[i] = -__builtin_inff();
  }
  for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0;
  for (int64_t i = 0; i < rows * kTotals; ++i) totals[i] = 0;
  for (int64_t first = 0; first < head.count; first += kKeys, packed += packed_floats(dim)) {
    const int64_t count = head.count - first < kKeys ? head.count - first : kKeys;
    const float *key_factors = packed + kKeys * words, *values = key_factors + kKeys;
    for (int64_t i = 0; i < rows; i += kRows) {
      float decays[kRows];
      const float* decay = nullptr;
      if (lse || !Weights::weigh(queries + i * words, factors + i, packed, dim, count, largest + i, weights,
                                 totals + i * kTotals)) {
        Scores::score(queries + i * words, factors + i, packed, key_factors, dim, count, weights, kKeys);
        for (int r = 0; r < kRows; ++r) {
          Weights::soften(weights + r * kKeys, count, largest + i + r, totals + (i + r) * kTotals, decays + r);
        }
        decay = decays;
      }
      if (!output) continue;
      int64_t column = 0;
      for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) {
        Weights::template accumulate<kVectors>(weights, values, count, decay, width, column, sums + i * width);
      }
      if (column < width)
        Weights::template accumulate<1>(weights, values, count, decay, width, column, sums + i * width);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t token = begin + i;
    const float* totals_of = totals + i * kTotals;
    const float total = sum_of_lanes(load(totals_of)), rounded = sum_of_lanes(load(totals_of + kTotals - kLanes));
    if (output) write(sums + i * width, 1 / rounded, head.stored, token * head.heads * dim, dim, output);
    if (lse) lse[token * head.heads] = kLn2 * largest[i] + __builtin_logf(total);
  }
}

void tap(const AttentionHead& head, const int32_t* taps, int64_t n_taps, float* rows, int64_t stride) {
  const int64_t padded = (head.count + kKeys - 1) / kKeys * kKeys;
  float* queries = head.scratch;
  float* keys = queries + kTapRows * kMaxDim;
  float* scores = keys + kKeys * kMaxDim;   // [kTapRows, padded]
  for (int64_t r = 0; r < kTapRows; ++r) {  // rows beyond the last tap repeat it
    FloatScores::pack_query(head, taps[r < n_taps ? r : n_taps - 1], queries + r * head.dim, nullptr);
  }
  for (int64_t first = 0; first < head.count; first += kKeys) {
    const int64_t count = head.count - first < kKeys ? head.count - first : kKeys;
    FloatScores::pack_keys(head, first, count, keys, nullptr);
    for (int64_t r = 0; r < n_taps; r += kRows) {
      FloatScores::score(queries + r * head.dim, nullptr, keys, nullptr, head.dim, count, scores + r * padded + first,
                         padded);
    }
  }
  for (int64_t r = 0; r < n_taps; ++r) {
    float* row = scores + r * padded;
    for (int64_t k = head.count; k % kLanes; ++k) row[k] = -__builtin_inff();
    Floats most = load(row), sum = {};
    for (int64_t k = kLanes; k < head.count; k += kLanes) most = larger(most, load(row + k));
    const Floats largest = largest_lane(most);
    for (int64_t k = 0; k < head.count; k += kLanes) {
      const Floats weight = power_of_two(load(row + k) - largest);
      store(row + k, weight);
      sum += weight;
    }
    const float factor = 1 / sum_of_lanes(sum);
    for (int64_t k = 0; k < head.count; ++k) rows[k * stride + r] = factor * row[k];
  }
}

void key_norms(const void* qkv, Stored stored, int64_t count, int64_t heads, int64_t dim, float* norms) {
  constexpr int64_t kPart = 256;
  const int64_t size = heads * dim;
  for (int64_t t = 0; t < count; ++t) {
    Floats sum = {};
    for (int64_t at = 0; at < size; at += kPart) {
      float part[kPart] = {};
      read(qkv, stored, (3 * t + 1) * size + at, size - at < kPart ? size - at : kPart, 1.0f, part);
      for (int64_t i = 0; i < kPart; i += kLanes) sum = fma(load(part + i), load(part + i), sum);
    }
    norms[t] = sum_of_lanes(sum);
  }
}

// Kernels that take bfloat16 inputs by Scores and Weights, and others in float32.
template <class Scores, class Weights>
struct BFloat16Kernels {
  static void pack(const AttentionHead& head, int64_t first, bool with_values, float* block) {
    const bool halves = head.stored == Stored::kBFloat16;
    (halves ? cpu::pack<Scores, Weights> : cpu::pack<FloatScores, FloatWeights>)(head, first, with_values, block);
  }

  static void attend(const AttentionHead& head, const float* packed, int64_t begin, int64_t end, void* output,
                     float* lse) {
    const bool halves = head.stored == Stored::kBFloat16;
    auto* function = halves ? cpu::attend<Scores, Weights> : cpu::attend<FloatScores, FloatWeights>;
    function(head, packed, begin, end, output, lse);
  }

  static constexpr AttentionKernels kKernels = {pack, attend, tap, key_norms};
};

constexpr AttentionKernels kKernels = {pack<FloatScores, FloatWeights>, attend<FloatScores, FloatWeights>, tap,
                                       key_norms};

}  // namespace
}  // namespace namedmask::cpu
