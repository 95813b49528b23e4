// SPDX-License-Identifier: MIT
// normalized_cut's inner loop, compiled once per instruction level; level.h describes the rules.
#include "normalized_cut_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

// Tables hold the 16 possible sums of every four entries. AVX-512 keeps all of them in registers and looks up eight
// rows at a time; other levels join pairs of them into tables in memory with the 256 sums of eight entries.
void add_selected(const uint32_t* words, int64_t n, const double* x, double* sums) {
  double fours[8][16];
  for (int f = 0; f < 8; ++f) {
    fours[f][0] = 0;
    for (int bit = 0; bit < 4; ++bit) {
      for (int k = 0; k < 1 << bit; ++k) fours[f][k + (1 << bit)] = fours[f][k] + x[4 * f + bit];
    }
  }
  int64_t i = 0;
#if defined(__AVX512F__)
  __m512d low[8], high[8];  // entries 0 to 7 and 8 to 15 of each table
  for (int f = 0; f < 8; ++f) low[f] = _mm512_loadu_pd(fours[f]), high[f] = _mm512_loadu_pd(fours[f] + 8);
  for (; i + 8 <= n; i += 8) {
    const __m512i rows = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i)));
    // The instruction reads four bits of an index. With a mask of ones: GCC 12 warns about the plain intrinsic.
    const auto sum = [&](int f) {
      return _mm512_permutex2var_pd(low[f], _mm512_maskz_srli_epi64(0xff, rows, 4 * f), high[f]);
    };
    const __m512d all = ((sum(0) + sum(1)) + (sum(2) + sum(3))) + ((sum(4) + sum(5)) + (sum(6) + sum(7)));
    _mm512_storeu_pd(sums + i, _mm512_loadu_pd(sums + i) + all);
  }
  for (; i < n; ++i) {
    const auto sum = [&](int f) { return fours[f][words[i] >> (4 * f) & 15]; };
    sums[i] += ((sum(0) + sum(1)) + (sum(2) + sum(3))) + ((sum(4) + sum(5)) + (sum(6) + sum(7)));
  }
#else
  double eights[4][256];
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 256; ++k) eights[e][k] = fours[2 * e][k & 15] + fours[2 * e + 1][k >> 4];
  }
  for (; i < n; ++i) {
    const uint32_t w = words[i];
    sums[i] += (eights[0][w & 255] + eights[1][w >> 8 & 255]) + (eights[2][w >> 16 & 255] + eights[3][w >> 24]);
  }
#endif
}

constexpr CutKernels kKernels = {add_selected};

}  // namespace
}  // namespace namedmask::cpu
