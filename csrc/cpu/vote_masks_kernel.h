// SPDX-License-Identifier: MIT
// vote_masks' inner loops, compiled once per instruction level; level.h describes the rules.
#include "vote_masks_levels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

#if defined(__AVX512F__)
inline uint64_t nonzero(const uint8_t* bytes) {
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
}
#elif defined(__AVX2__)
inline uint64_t nonzero(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * half));
    const auto zero = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
    bits |= static_cast<uint64_t>(~zero) << (32 * half);
  }
  return bits;
}
#else
inline uint64_t nonzero(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(bytes[i] != 0) << i;
  return bits;
}
#endif

void pack(const uint8_t* bytes, int64_t n, uint64_t* bits) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) *bits++ = nonzero(bytes + i);
  int64_t word = i / 64;
  if (i < n) {
    uint8_t rest[64] = {};
    for (int64_t k = i; k < n; ++k) rest[k - i] = bytes[k];
    *bits++ = nonzero(rest), ++word;
  }
  for (; word % kVoteWords; ++word) *bits++ = 0;
}

#if defined(__AVX512VPOPCNTDQ__)
void common(const uint64_t* a, const uint64_t* b, int64_t words, int64_t* counts) {
  __m512i sums[kVoteMasks] = {};
  for (int64_t w = 0; w < words; w += 8) {
    const __m512i x = _mm512_loadu_si512(a + w);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kVoteMasks; ++k) {
      const __m512i both = _mm512_and_si512(x, _mm512_loadu_si512(b + k * words + w));
      sums[k] = _mm512_add_epi64(sums[k], _mm512_popcnt_epi64(both));
    }
  }
  for (int64_t k = 0; k < kVoteMasks; ++k) {
    uint64_t lanes[8];
    _mm512_storeu_si512(lanes, sums[k]);
    counts[k] = 0;
    for (uint64_t lane : lanes) counts[k] += static_cast<int64_t>(lane);
  }
}
#elif defined(__AVX2__)
// Counts the bits of each byte with a table of 16 half bytes, and adds groups of eight bytes to 64-bit sums.
void common(const uint64_t* a, const uint64_t* b, int64_t words, int64_t* counts) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sums[kVoteMasks] = {};
  for (int64_t w = 0; w < words; w += 4) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + w));
#pragma GCC unroll 4
    for (int64_t k = 0; k < kVoteMasks; ++k) {
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + k * words + w));
      const __m256i both = _mm256_and_si256(x, y);
      const __m256i bytes =
          _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(both, low)),
                          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low)));
      sums[k] = _mm256_add_epi64(sums[k], _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
  }
  for (int64_t k = 0; k < kVoteMasks; ++k) {
    uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums[k]);
    counts[k] = static_cast<int64_t>(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
  }
}
#else
void common(const uint64_t* a, const uint64_t* b, int64_t words, int64_t* counts) {
  for (int64_t k = 0; k < kVoteMasks; ++k) {
    counts[k] = 0;
    for (int64_t w = 0; w < words; ++w) counts[k] += __builtin_popcountll(a[w] & b[k * words + w]);
  }
}
#endif

constexpr VoteKernels kKernels = {pack, common};

}  // namespace
}  // namespace namedmask::cpu
