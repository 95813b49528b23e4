// SPDX-License-Identifier: MIT
// connected_components' inner loops, compiled once per instruction level; level.h describes the rules.
//
// A row is a bit string, processed 64 pixels at a time: where runs begin and end, where they touch the row above, and
// which of them touch nothing. That leaves one or two table lookups per run. In a maze every branch that depends on the
// pixels would be mispredicted half of the time, so there are hardly any.
#include "connected_components_levels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

inline int count_ones(uint64_t bits) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return __builtin_popcountll(bits);
#else  // avoids a library call
  bits -= bits >> 1 & 0x5555555555555555ull;
  bits = (bits & 0x3333333333333333ull) + (bits >> 2 & 0x3333333333333333ull);
  return static_cast<int>(((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0full) * 0x0101010101010101ull >> 56);
#endif
}

// Finds the edges of runs in a row, word by word, carrying one bit from word to word.
struct Edges {
  uint64_t before = 0;  // the bit left of the word

  // begins: the first bit of each run; ends: the bit after the last.
  inline void next(uint64_t word, uint64_t& begins, uint64_t& ends) {
    const uint64_t shifted = word << 1 | before;
    before = word >> 63;
    begins = word & ~shifted;
    ends = shifted & ~word;
  }
};

// word + bits over all words of a row. Adding a bit of a run carries through its end: the ones from that bit on become
// zeros, and the zero after the run becomes a one.
struct Adder {
  bool carry = false;

  inline uint64_t next(uint64_t word, uint64_t bits) {
    uint64_t sum;
    const bool first = __builtin_add_overflow(word, bits, &sum);
    const bool second = __builtin_add_overflow(sum, static_cast<uint64_t>(carry), &sum);
    carry = first | second;
    return sum;
  }
};

// Up to 64 bytes 0 or 1 -> bits.
inline uint64_t pack(const uint8_t* p, int64_t n) {
#if defined(__AVX512BW__)
  const __mmask64 there = n < 64 ? (1ull << n) - 1 : ~0ull;
  const __m512i bytes = _mm512_maskz_loadu_epi8(there, p);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
#if defined(__AVX2__)
  if (n >= 64) {
    const auto half = [](const uint8_t* q) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(bytes, _mm256_setzero_si256())));
    };
    return half(p) | static_cast<uint64_t>(half(p + 32)) << 32;
  }
#endif
  uint64_t word = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, p + i, 8);
    word |= (bytes * 0x0102040810204080ull >> 56) << i;  // pixel 0 in bit 0
  }
  for (; i < n; ++i) word |= static_cast<uint64_t>(p[i] & 1) << i;
  return word;
#endif
}

// Bits -> up to 64 bytes 0 or 1.
inline void unpack(uint64_t word, int64_t n, uint8_t* p) {
#if defined(__AVX512BW__)
  const __mmask64 there = n < 64 ? (1ull << n) - 1 : ~0ull;
  _mm512_mask_storeu_epi8(p, there, _mm512_maskz_set1_epi8(word, 1));
#else
#if defined(__AVX2__)
  if (n >= 64) {
    const auto half = [](uint32_t bits, uint8_t* q) {
      const __m256i spread =
          _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)),
                              _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
      const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_and_si256(set, _mm256_set1_epi8(1)));
    };
    half(static_cast<uint32_t>(word), p);
    half(static_cast<uint32_t>(word >> 32), p + 32);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = word >> i & 1;
#endif
}

void scan(const uint8_t* mask, bool value, const Runs& runs) {
  const int64_t words = runs.words, last = runs.width - 64 * (words - 1);  // pixels in the last word, 0 to 63
  int32_t count = 0;
  uint64_t* bits = runs.bits;
  for (int64_t y = 0; y < runs.height; ++y, mask += runs.width) {
    runs.first[y] = count;
    Edges edges;
    for (int64_t i = 0; i < words; ++i) {
      const int64_t n = i + 1 < words ? 64 : last;
      uint64_t word = pack(mask + 64 * i, n);
      if (!value) word = ~word & (n == 64 ? ~0ull : (1ull << n) - 1);
      uint64_t begins, ends;
      edges.next(word, begins, ends);
      count += count_ones(begins);
      *bits++ = word;
    }
  }
  runs.first[runs.height] = count;
}

inline int32_t root(const int32_t* parent, int32_t label) {
  int32_t node = parent[parent[label]];  // rarely deeper
  while (parent[node] != node) node = parent[node];
  return node;
}

inline void unite(int32_t* parent, int32_t a, int32_t b) {
  const int32_t x = root(parent, a), y = root(parent, b);
  const int32_t low = x < y ? x : y;
  parent[x] = parent[y] = low;  // no effect if already merged, and cheaper than a mispredicted branch
  parent[a] = parent[b] = low;
}

int32_t join(const Runs& runs) {
  int32_t* const parent = runs.parent;
  const int64_t words = runs.words;
  int32_t count = 0;
  const auto give = [&](int32_t* label, int64_t y) {
    *label = parent[count] = count;
    runs.top[count++] = static_cast<int32_t>(y);
  };
  for (int32_t run = 0; run < runs.first[1]; ++run) give(runs.label + run, 0);
  for (int64_t y = 1; y < runs.height; ++y) {
    if (runs.first[y] == runs.first[y + 1]) continue;
    const uint64_t* here = runs.bits + y * words;
    const uint64_t* there = here - words;
    int32_t* own = runs.label + runs.first[y];  // of the first run that ends in the word
    int32_t* own_before = own - 1;              // of the last run that begins before the word
    int32_t* above_before = runs.label + runs.first[y - 1] - 1;
    Edges own_edges, above_edges, contact_edges;
    Adder adder;
    for (int64_t i = 0; i < words; ++i) {
      uint64_t begins, ends, above_begins, contacts, ignored;
      own_edges.next(here[i], begins, ends);
      above_edges.next(there[i], above_begins, ignored);
      contact_edges.next(here[i] & there[i], contacts, ignored);  // the first pixel of each contact of two runs
      const uint64_t sum = adder.next(here[i], contacts);
      // No carry reaches the end of a run without contact.
      for (uint64_t bits = ends & ~sum; bits; bits &= bits - 1) {
        give(own + count_ones(ends & (bits ^ (bits - 1))) - 1, y);
      }
      // The first contact of a run has become a zero; later contacts fall on zeros, which have become ones.
      for (uint64_t bits = contacts & ~sum; bits; bits &= bits - 1) {
        const uint64_t upto = bits ^ (bits - 1);
        own_before[count_ones(begins & upto)] = parent[above_before[count_ones(above_begins & upto)]];
      }
      for (uint64_t bits = contacts & sum; bits; bits &= bits - 1) {
        const uint64_t upto = bits ^ (bits - 1);
        unite(parent, own_before[count_ones(begins & upto)], above_before[count_ones(above_begins & upto)]);
      }
      own += count_ones(ends);
      own_before += count_ones(begins);
      above_before += count_ones(above_begins);
    }
  }
  return count;
}

#if defined(__AVX512VBMI2__)

struct Places {
  uint8_t at[64];
};

constexpr Places places() {
  Places table = {};
  for (int i = 0; i < 64; ++i) table.at[i] = static_cast<uint8_t>(i);
  return table;
}

alignas(64) constexpr Places kPlaces = places();

#endif

// Writes `from` + the positions of the set bits, no two of which are adjacent, and up to kPadding further values:
// cheaper than a branch after each.
inline int32_t* positions(uint64_t bits, int32_t from, int32_t* out) {
  int32_t* const end = out + count_ones(bits);
#if defined(__AVX512VBMI2__)
  // With masks of ones: GCC 12 warns about uninitialized source operands in the plain intrinsics.
  const __m512i found = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kPlaces.at));
  const auto store = [from](__m128i sixteen, int32_t* to) {
    const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, sixteen);
    _mm512_storeu_si512(to, _mm512_add_epi32(wide, _mm512_set1_epi32(from)));
  };
  store(_mm512_maskz_extracti32x4_epi32(0xf, found, 0), out);
  if (end - out > 16) store(_mm512_maskz_extracti32x4_epi32(0xf, found, 1), out + 16);
#else
  while (bits) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      *out++ = from + (bits ? __builtin_ctzll(bits) : 0);
      bits &= bits - 1;
    }
  }
#endif
  return end;
}

// The first column of each run of a row, and the column after the last.
inline void columns(const uint64_t* row, int64_t words, int32_t* begin, int32_t* end) {
  Edges edges;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t begins, ends;
    edges.next(row[i], begins, ends);
    begin = positions(begins, static_cast<int32_t>(64 * i), begin);
    end = positions(ends, static_cast<int32_t>(64 * i), end);
  }
}

int32_t join_eight(const Runs& runs) {
  int32_t* const parent = runs.parent;
  const int64_t most = runs.width / 2 + 1 + Runs::kPadding;
  int32_t count = 0, above_runs = 0;
  for (int64_t y = 0; y < runs.height; ++y) {
    int32_t *const begin = runs.ends + y % 2 * 2 * most, *const end = begin + most;
    const int32_t *const above_begin = runs.ends + (y + 1) % 2 * 2 * most, *const above_end = above_begin + most;
    columns(runs.bits + y * runs.words, runs.words, begin, end);
    int32_t* const own = runs.label + runs.first[y];
    const int32_t* const above = own - above_runs;
    const int32_t own_runs = runs.first[y + 1] - runs.first[y];
    for (int32_t k = 0, a = 0; k < own_runs; ++k) {
      while (a < above_runs && above_end[a] < begin[k]) ++a;
      int32_t touched = a;
      if (a < above_runs && above_begin[a] <= end[k]) {
        own[k] = parent[above[touched++]];
        for (; touched < above_runs && above_begin[touched] <= end[k]; ++touched) unite(parent, own[k], above[touched]);
        a = touched - 1;  // may touch the next run, too
      } else {
        own[k] = parent[count] = count;
        runs.top[count++] = static_cast<int32_t>(y);
      }
    }
    above_runs = own_runs;
  }
  return count;
}

typedef int32_t I4 __attribute__((vector_size(16), aligned(4), may_alias));

void measure(const int32_t* final, const Runs& runs, Extent* extents) {
  const int64_t most = runs.width / 2 + 1 + Runs::kPadding;
  for (int64_t y = 0; y < runs.height; ++y) {
    columns(runs.bits + y * runs.words, runs.words, runs.ends, runs.ends + most);
    int32_t* const labels = runs.label + runs.first[y];
    const int32_t count = runs.first[y + 1] - runs.first[y];
    for (int32_t k = 0; k < count; ++k) {
      const int32_t label = labels[k] = final[labels[k]], left = runs.ends[k], right = runs.ends[most + k];
      I4* const extent = reinterpret_cast<I4*>(extents + label);
      const I4 run = {0, -left, right, static_cast<int32_t>(y + 1)};
      const I4 both = *extent > run ? *extent : run;
      *extent = both + I4{right - left, 0, 0, 0};
    }
  }
}

#if defined(__AVX512VPOPCNTDQ__)

void paint(const Runs& runs, int32_t* out) {
  const __m512i upto = _mm512_sub_epi32(
      _mm512_sllv_epi32(_mm512_set1_epi32(2), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
      _mm512_set1_epi32(1));
  const uint64_t* bits = runs.bits;
  for (int64_t y = 0; y < runs.height; ++y, out += runs.width) {
    const int32_t* labels = runs.label + runs.first[y] - 1;  // the last run that begins before the sixteen pixels
    Edges edges;
    for (int64_t i = 0; i < runs.words; ++i) {
      uint64_t word = *bits++, begins, ends;
      edges.next(word, begins, ends);
      const int64_t left = runs.width - 64 * i;
      for (int64_t j = 0; j < 64 && j < left; j += 16, word >>= 16, begins >>= 16) {
        const __m512i rank =
            _mm512_popcnt_epi32(_mm512_and_si512(_mm512_set1_epi32(static_cast<int32_t>(begins)), upto));
        const __m512i painted =
            _mm512_maskz_permutexvar_epi32(static_cast<__mmask16>(word), rank, _mm512_loadu_si512(labels));
        if (j + 16 <= left) {
          _mm512_storeu_si512(out + 64 * i + j, painted);
        } else {
          _mm512_mask_storeu_epi32(out + 64 * i + j, (1u << (left - j)) - 1, painted);
        }
        labels += count_ones(begins & 0xffff);
      }
    }
  }
}

#else

// byte j of at[b]: number of ones among the bits 0 .. j of b
struct Ranks {
  uint64_t at[256];
};

constexpr Ranks ranks() {
  Ranks table = {};
  for (uint64_t b = 0; b < 256; ++b) {
    uint64_t ones = 0;
    for (int j = 0; j < 8; ++j) {
      ones += b >> j & 1;
      table.at[b] |= ones << 8 * j;
    }
  }
  return table;
}

constexpr Ranks kRanks = ranks();

// Eight pixels: labels[byte of rank], and 0 where `set` has no bit.
inline void paint_eight(const int32_t* labels, uint64_t rank, unsigned set, int32_t* out) {
#if defined(__AVX2__)
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(rank)));
  const __m256i near = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(labels));
  const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i inside = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(set)), own), own);
  const __m256i painted = _mm256_and_si256(_mm256_permutevar8x32_epi32(near, index), inside);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), painted);
#else
  for (int j = 0; j < 8; ++j) out[j] = labels[rank >> 8 * j & 0xff] & -static_cast<int32_t>(set >> j & 1);
#endif
}

void paint(const Runs& runs, int32_t* out) {
  const uint64_t* bits = runs.bits;
  for (int64_t y = 0; y < runs.height; ++y, out += runs.width) {
    const int32_t* labels = runs.label + runs.first[y] - 1;  // the last run that begins before the eight pixels
    Edges edges;
    for (int64_t i = 0; i < runs.words; ++i) {
      const uint64_t word = *bits++;
      uint64_t begins, ends;
      edges.next(word, begins, ends);
      const int64_t left = runs.width - 64 * i;
      for (int64_t j = 0; j < 64 && j < left; j += 8) {
        const uint64_t rank = kRanks.at[begins >> j & 0xff];
        const unsigned set = word >> j & 0xff;
        if (j + 8 <= left) {
          paint_eight(labels, rank, set, out + 64 * i + j);
        } else {
          int32_t eight[8];
          paint_eight(labels, rank, set, eight);
          for (int64_t k = 0; k < left - j; ++k) out[64 * i + j + k] = eight[k];
        }
        labels += rank >> 56;
      }
    }
  }
}

#endif

void keep(const uint8_t* keep, const Runs& runs, bool invert, uint8_t* out) {
  const uint64_t* bits = runs.bits;
  for (int64_t y = 0; y < runs.height; ++y, out += runs.width) {
    const int32_t* label = runs.label + runs.first[y];
    Edges edges;
    Adder adder;
    for (int64_t i = 0; i < runs.words; ++i) {
      const uint64_t word = *bits++;
      uint64_t begins, ends, dropped = 0;
      edges.next(word, begins, ends);
      for (; begins; begins &= begins - 1) dropped |= (begins & -begins) & (uint64_t{keep[*label++]} - 1);
      const uint64_t kept = word & adder.next(word, dropped);  // adding its first bit removes a run
      const int64_t left = runs.width - 64 * i;
      unpack(invert ? ~kept : kept, left < 64 ? left : 64, out + 64 * i);
    }
  }
}

constexpr ComponentKernels kKernels = {scan, join, join_eight, measure, paint, keep};

}  // namespace
}  // namespace namedmask::cpu
