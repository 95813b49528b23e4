// SPDX-License-Identifier: MIT
// Products of 16-bit integers, two per lane, or of bytes, four per lane: two and four times the rate of float
// multiply-adds.
#include "cosines_kernel.h"

namespace namedmask::cpu {
namespace {

double quantize(const float* row, int64_t channels, int16_t* out) {
  Floats squares = Floats{};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __mmask16 there = channels - c < kLanes ? (1u << (channels - c)) - 1 : 0xffff;
    const Floats exact = broadcast(kUnit) * _mm512_maskz_loadu_ps(there, row + c);
    const __m512i rounded = _mm512_cvtps_epi32(exact);
    const Floats error = exact - _mm512_cvtepi32_ps(rounded);
    squares = fma(error, error, squares);
    _mm512_mask_cvtepi32_storeu_epi16(out + c, there, rounded);
  }
  if (channels % 2) out[channels] = 0;
  return _mm512_reduce_add_ps(squares);
}

constexpr int kIntegerRows = 6;  // with more, GCC does not keep the sums in registers

void connect_quantized(const int16_t* rows, int64_t count, const int16_t* panels, int64_t channels, int32_t low,
                       int32_t high, uint32_t* bits, uint32_t* unsure) {
  static_assert(2 * kPanel == kWord && kLanes == kPanel && kMicroRows % kIntegerRows == 0);
  const int64_t pairs = (channels + 1) / 2;
  const __m512i above = _mm512_set1_epi32(high), below = _mm512_set1_epi32(low);
  const auto join = [](uint32_t first, uint32_t second) { return first | second << kPanel; };
  for (int64_t r = 0; r < count; r += kIntegerRows) {
    __m512i sums[kIntegerRows][2] = {};
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512i b0 = _mm512_loadu_si512(panels + k * 2 * kPanel);
      const __m512i b1 = _mm512_loadu_si512(panels + (pairs + k) * 2 * kPanel);
#pragma GCC unroll 6
      for (int i = 0; i < kIntegerRows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, rows + ((r + i) * pairs + k) * 2, sizeof pair);
        const __m512i factor = _mm512_set1_epi32(pair);
        sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], b0, factor);
        sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], b1, factor);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kIntegerRows; ++i) {
      const __m512i first = sums[i][0], second = sums[i][1];
      const uint32_t over = join(_mm512_cmpgt_epi32_mask(first, above), _mm512_cmpgt_epi32_mask(second, above));
      bits[r + i] = over;
      unsure[r + i] = ~over & join(_mm512_cmpge_epi32_mask(first, below), _mm512_cmpge_epi32_mask(second, below));
    }
  }
}

__mmask16 lanes(int64_t n) { return n < kLanes ? (1u << n) - 1 : 0xffff; }

Floats part(const float* row, int64_t c, int64_t channels) {
  return _mm512_maskz_loadu_ps(lanes(channels - c), row + c);
}

void quantize_bytes(const float* row, int64_t channels, int64_t i, const Bytes& bytes) {
  const int64_t groups = (channels + kByteGroup - 1) / kByteGroup, padded = groups * kByteGroup;
  const auto apart = [&](int64_t c) { return part(row, c, channels) - part(bytes.center, c, channels); };
  Floats largest = Floats{};
  for (int64_t c = 0; c < channels; c += kLanes) largest = larger(largest, _mm512_abs_ps(apart(c)));
  const float most = _mm512_reduce_max_ps(largest), unit = most / 127;
  const float inverse = most > 1e-30f ? 127 / most : 0;  // smaller vectors are all error
  int8_t* out = bytes.rows + i * padded;
  Floats squares = Floats{}, length = squares,
         along = squares;  // of the error and of token - center; product with center
  __m512i sums = _mm512_setzero_si512();
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats exact = apart(c);
    length = fma(exact, exact, length);
    along = fma(exact, part(bytes.center, c, channels), along);
    const __m512i rounded = _mm512_cvtps_epi32(broadcast(inverse) * exact);
    // relative to the rounded unit, which products use
    const Floats error = exact - broadcast(unit) * _mm512_cvtepi32_ps(rounded);
    squares = fma(error, error, squares);
    sums = _mm512_add_epi32(sums, rounded);
    _mm512_mask_cvtsepi32_storeu_epi8(out + c, lanes(padded - c), rounded);
  }
  bytes.units[i] = unit;
  bytes.lengths[i] = __builtin_sqrtf(_mm512_reduce_add_ps(length));
  bytes.along[i] = _mm512_reduce_add_ps(along);
  bytes.errors[i] = __builtin_sqrtf(_mm512_reduce_add_ps(squares));
  bytes.sums[i] = _mm512_reduce_add_epi32(sums);
  uint8_t* panel = bytes.panels + i / kPanel * kPanel * padded + i % kPanel * kByteGroup;
  for (int64_t k = 0; k < groups; ++k) {
    uint32_t group;
    __builtin_memcpy(&group, out + k * kByteGroup, sizeof group);
    group ^= 0x80808080u;  // plus 128: one operand of vpdpbusd is unsigned
    __builtin_memcpy(panel + k * kPanel * kByteGroup, &group, sizeof group);
  }
}

void compare_bytes(const Bytes& bytes, int64_t row, int64_t count, int64_t column, int64_t channels, float low,
                   float high, uint32_t* bits, uint32_t* unsure) {
  const int64_t groups = (channels + kByteGroup - 1) / kByteGroup;
  const uint8_t* panels = bytes.panels + column * groups * kByteGroup;
  for (int64_t r = row; r < row + count; r += kIntegerRows) {
    __m512i sums[kIntegerRows][2];
    // subtract the contribution of the 128 first
#pragma GCC unroll 6
    for (int i = 0; i < kIntegerRows; ++i) sums[i][0] = sums[i][1] = _mm512_set1_epi32(-128 * bytes.sums[r + i]);
    for (int64_t k = 0; k < groups; ++k) {
      const __m512i b0 = _mm512_loadu_si512(panels + k * kPanel * kByteGroup);
      const __m512i b1 = _mm512_loadu_si512(panels + (groups + k) * kPanel * kByteGroup);
#pragma GCC unroll 6
      for (int i = 0; i < kIntegerRows; ++i) {
        int32_t group;
        __builtin_memcpy(&group, bytes.rows + ((r + i) * groups + k) * kByteGroup, sizeof group);
        const __m512i factor = _mm512_set1_epi32(group);
        sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], b0, factor);
        sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], b1, factor);
      }
    }
    // the error of a . b is at most |a'| times b's error plus |b| times a's error, with |a'| <= |a| + a's error
#pragma GCC unroll 6
    for (int i = 0; i < kIntegerRows; ++i) {
      const Floats unit = broadcast(bytes.units[r + i]), error = broadcast(bytes.errors[r + i]);
      const Floats length = broadcast(bytes.lengths[r + i]) + error;
      const Floats least = broadcast(low - bytes.along[r + i]), most = broadcast(high - bytes.along[r + i]);
      uint32_t over = 0, under = 0;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t at = column + v * kPanel;
        const Floats off = fma(error, load(bytes.lengths + at), length * load(bytes.errors + at));
        const Floats product = _mm512_cvtepi32_ps(sums[i][v]) * (unit * load(bytes.units + at));
        const Floats value = product + load(bytes.along + at);
        over |= above(value - off, most) << (v * kPanel);
        under |= above(least, value + off) << (v * kPanel);
      }
      bits[r - row + i] = over;
      unsure[r - row + i] = ~(over | under);
    }
  }
}

constexpr int kColumns = 4;  // that share the reads of a row

constexpr int kAtOnce = 4;  // most words of 64 bits have no more bits set

// Writes the positions of the bits that are set in words [count], kBlock words apart, and returns their number. Writes
// up to kAtOnce values more. Branches that depend on single bits would often be mispredicted.
int64_t positions(const uint32_t* words, int64_t count, int32_t* out) {
  int32_t* next = out;
  for (int64_t word = 0; word < count; word += 2) {
    uint64_t set = words[word * kBlock];
    if (word + 1 < count) set |= uint64_t{words[(word + 1) * kBlock]} << kWord;
    int32_t* const end = next + __builtin_popcountll(set);
    do {
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i, set &= set - 1) {
        next[i] = static_cast<int32_t>(word * kWord) + __builtin_ctzll(set | uint64_t{1} << 63);
      }
      next += kAtOnce;
    } while (next < end);
    next = end;
  }
  return next - out;
}

// Lane j: the sum of the lanes of sums[j].
__m128i sums_of_lanes(const __m512i (&sums)[kColumns]) {
  const auto halved = [&](int j) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums[j]), _mm512_extracti64x4_epi64(sums[j], 1));
  };
  const __m256i all =
      _mm256_hadd_epi32(_mm256_hadd_epi32(halved(0), halved(1)), _mm256_hadd_epi32(halved(2), halved(3)));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

void decide(const int16_t* rows, int64_t count, const int16_t* columns, int64_t words, int64_t channels, int32_t low,
            int32_t high, uint32_t* unsure, uint32_t* bits, int64_t stride) {
  constexpr int64_t kValues = 2 * kLanes;
  const int64_t length = (channels + 1) / 2 * 2, whole = length / kValues * kValues;
  const auto last = static_cast<__mmask32>((uint64_t{1} << (length - whole)) - 1);
  for (int64_t r = 0; r < count; ++r) {
    const int16_t* row = rows + r * length;
    int32_t tokens[kTileWords * kWord + kAtOnce];
    const int64_t found = positions(unsure + r, words, tokens);
    for (int j = 0; j < kColumns; ++j) tokens[found + j] = tokens[0];
    for (int64_t first = 0; first < found; first += kColumns) {
      const int16_t* column[kColumns];
      for (int j = 0; j < kColumns; ++j) column[j] = columns + tokens[first + j] * length;
      __m512i sums[kColumns] = {};
      for (int64_t c = 0; c < whole; c += kValues) {
        const __m512i part = _mm512_loadu_si512(row + c);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          sums[j] = _mm512_dpwssd_epi32(sums[j], part, _mm512_loadu_si512(column[j] + c));
        }
      }
      if (last) {
        const __m512i part = _mm512_maskz_loadu_epi16(last, row + whole);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          sums[j] = _mm512_dpwssd_epi32(sums[j], part, _mm512_maskz_loadu_epi16(last, column[j] + whole));
        }
      }
      const __m128i dots = sums_of_lanes(sums);
      const uint32_t over = _mm_cmpgt_epi32_mask(dots, _mm_set1_epi32(high));
      const uint32_t under = _mm_cmplt_epi32_mask(dots, _mm_set1_epi32(low));
      for (int j = 0; j < kColumns; ++j) {
        const int32_t word = tokens[first + j] / kWord, bit = tokens[first + j] % kWord;
        bits[word * stride + r] |= (over >> j & 1) << bit;
        unsure[word * kBlock + r] &= ~(((over | under) >> j & 1) << bit);
      }
    }
  }
}

float dot(const float* a, const float* b, int64_t channels) {
  Floats sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    sums[0] = fma(load(a + c), load(b + c), sums[0]);
    sums[1] = fma(load(a + c + kLanes), load(b + c + kLanes), sums[1]);
  }
  float lanes[kLanes];
  store(lanes, sums[0] + sums[1]);
  for (int64_t l = 0; c < channels; ++c, l = (l + 1) % kLanes) lanes[l] += a[c] * b[c];
  return sum_of_lanes(load(lanes));
}

}  // namespace

const CosineKernels cosines_avx512_vnni = {
    connect, quantize, connect_quantized, dot, quantize_bytes, compare_bytes, decide,
};

}  // namespace namedmask::cpu
