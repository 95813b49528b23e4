// SPDX-License-Identifier: MIT
// attention_features' inner loops, included by one file per instruction level; level.h says what is allowed here.
//
// Queries are taken kQueries at a time over all keys, the keys kKeys at a time in their order (flash attention). Keys
// and values are copied to float32 blocks first, which serves every stored type and keeps them in the cache.
#include "attention_features_levels.h"
#include "exponential.h"
#include "lanes.h"

namespace namedmask::cpu {
namespace {

static_assert(kQueries % kRows == 0 && kTapRows % kRows == 0 && kKeys % (kVectors * kLanes) == 0);

inline float sum_of_lanes(V v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

inline float largest_lane(V v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  }
  return lanes[0];
}

// -- stored types, written so that the compiler makes vectors of them ------------------------------------------------

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

// Query `token` times scale; zeros for a token that is not there.
inline void copy_query(const AttentionHead& head, int64_t token, bool there, float* out) {
  if (there) return read(head.qkv, head.stored, element(head, token, 0), head.dim, head.scale, out);
  for (int64_t d = 0; d < head.dim; ++d) out[d] = 0;
}

// Keys [first, first + kKeys), turned to [dim, kKeys]; zeros beyond the end.
void copy_keys(const AttentionHead& head, int64_t first, float* out) {
  constexpr int64_t kTurn = 8;  // keys at a time: their part of a line of `out` is written in one go
  float turn[kTurn][kMaxDim];
  for (int64_t k = 0; k < kKeys; k += kTurn) {
    for (int64_t i = 0; i < kTurn; ++i) {
      const int64_t token = first + k + i;
      if (token < head.count) {
        read(head.qkv, head.stored, element(head, token, 1), head.dim, 1.0f, turn[i]);
      } else {
        for (int64_t d = 0; d < head.dim; ++d) turn[i][d] = 0;
      }
    }
    for (int64_t d = 0; d < head.dim; ++d) {
      for (int64_t i = 0; i < kTurn; ++i) out[d * kKeys + k + i] = turn[i][d];
    }
  }
}

// Values [first, first + kKeys) as [kKeys, width]; zeros beyond the end and beyond dim.
void copy_values(const AttentionHead& head, int64_t first, int64_t width, float* out) {
  for (int64_t k = 0; k < kKeys; ++k, out += width) {
    const int64_t there = first + k < head.count ? head.dim : 0;
    if (there) read(head.qkv, head.stored, element(head, first + k, 2), there, 1.0f, out);
    for (int64_t d = there; d < width; ++d) out[d] = 0;
  }
}

// scores[i * stride + k] = query i . key k, for kRows queries [kRows, dim] and a block of keys [dim, kKeys].
void score(const float* queries, const float* keys, int64_t dim, float* scores, int64_t stride) {
  for (int64_t k = 0; k < kKeys; k += kVectors * kLanes) {
    V sums[kRows][kVectors] = {};
    multiply_add(sums, queries, dim, [=](int v) { return keys + k + v * kLanes; }, kKeys, dim);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) store(scores + i * stride + k + v * kLanes, sums[i][v]);
    }
  }
}

// sums [kRows, width] = decay[i] * sums + weights [kRows, kKeys] * values [kKeys, width], kWide vectors from `column`
// on. The block's products are added up by themselves first: the long sum over all keys would round more.
template <int kWide>
inline void accumulate(const float* weights, const float* values, const float* decay, int64_t width, int64_t column,
                       float* sums) {
  V block[kRows][kWide] = {};
  multiply_add(block, weights, kKeys, [=](int v) { return values + column + v * kLanes; }, width, kKeys);
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* row = sums + i * width + column;
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      store(row + v * kLanes, fma(broadcast(decay[i]), load(row + v * kLanes), block[i][v]));
    }
  }
}

// Scores of a row turned into exp(score - largest so far), in place; returns what earlier sums have to be multiplied
// by.
inline float soften(float* scores, float& largest, float& total) {
  V most = load(scores);
  for (int64_t k = kLanes; k < kKeys; k += kLanes) most = larger(most, load(scores + k));
  const float here = largest_lane(most);
  const float now = here > largest ? here : largest;
  V sum = {};
  for (int64_t k = 0; k < kKeys; k += kLanes) {
    const V weight = exponential(load(scores + k) - broadcast(now));
    store(scores + k, weight);
    sum += weight;
  }
  float decay[kLanes];
  store(decay, exponential(broadcast(largest - now)));
  total = total * decay[0] + sum_of_lanes(sum);
  largest = now;
  return decay[0];
}

void attend(const AttentionHead& head, int64_t begin, int64_t end, void* output, float* lse) {
  const int64_t dim = head.dim, width = (dim + kLanes - 1) / kLanes * kLanes;
  const int64_t rows = (end - begin + kRows - 1) / kRows * kRows;
  float* queries = head.scratch;
  float* keys = queries + kQueries * kMaxDim;
  float* values = keys + kKeys * kMaxDim;
  float* sums = values + kKeys * kMaxDim;
  float* weights = sums + kQueries * kMaxDim;
  float* largest = weights + kTapRows * kKeys;
  float* total = largest + kQueries;
  for (int64_t i = 0; i < rows; ++i) {
    copy_query(head, begin + i, begin + i < end, queries + i * dim);
    largest[i] = -__builtin_inff();
    total[i] = 0;
  }
  for (int64_t i = 0; i < rows * width; ++i) sums[i] = 0;
  for (int64_t first = 0; first < head.count; first += kKeys) {
    copy_keys(head, first, keys);
    if (output) copy_values(head, first, width, values);
    for (int64_t i = 0; i < rows; i += kRows) {
      float decay[kRows];
      score(queries + i * dim, keys, dim, weights, kKeys);
      for (int r = 0; r < kRows; ++r) {
        for (int64_t k = head.count - first; k < kKeys; ++k) weights[r * kKeys + k] = -__builtin_inff();
        decay[r] = soften(weights + r * kKeys, largest[i + r], total[i + r]);
      }
      if (!output) continue;
      int64_t column = 0;
      for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) {
        accumulate<kVectors>(weights, values, decay, width, column, sums + i * width);
      }
      if (column < width) accumulate<1>(weights, values, decay, width, column, sums + i * width);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t token = begin + i;
    if (output) write(sums + i * width, 1 / total[i], head.stored, token * head.heads * dim, dim, output);
    if (lse) lse[token * head.heads] = largest[i] + __builtin_logf(total[i]);
  }
}

void tap(const AttentionHead& head, const int32_t* taps, int64_t n_taps, float* rows, int64_t stride) {
  const int64_t padded = (head.count + kKeys - 1) / kKeys * kKeys;
  float* queries = head.scratch;
  float* keys = queries + kTapRows * kMaxDim;
  float* scores = keys + kKeys * kMaxDim;  // [kTapRows, padded]
  for (int64_t r = 0; r < kTapRows; ++r) copy_query(head, r < n_taps ? taps[r] : 0, r < n_taps, queries + r * head.dim);
  for (int64_t first = 0; first < head.count; first += kKeys) {
    copy_keys(head, first, keys);
    for (int64_t r = 0; r < n_taps; r += kRows) {
      score(queries + r * head.dim, keys, head.dim, scores + r * padded + first, padded);
    }
  }
  for (int64_t r = 0; r < n_taps; ++r) {
    float* row = scores + r * padded;
    for (int64_t k = head.count; k < padded; ++k) row[k] = -__builtin_inff();
    V most = load(row), sum = {};
    for (int64_t k = kLanes; k < padded; k += kLanes) most = larger(most, load(row + k));
    const V largest = broadcast(largest_lane(most));
    for (int64_t k = 0; k < padded; k += kLanes) {
      const V weight = exponential(load(row + k) - largest);
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
    V sum = {};
    for (int64_t at = 0; at < size; at += kPart) {
      float part[kPart] = {};
      read(qkv, stored, (3 * t + 1) * size + at, size - at < kPart ? size - at : kPart, 1.0f, part);
      for (int64_t i = 0; i < kPart; i += kLanes) sum = fma(load(part + i), load(part + i), sum);
    }
    norms[t] = sum_of_lanes(sum);
  }
}

}  // namespace
}  // namespace namedmask::cpu
