// SPDX-License-Identifier: MIT
// connected_components' inner loops, compiled once per instruction level; level.h describes the rules.
//
// A row is a bit string, processed 64 pixels at a time: where runs begin and end, where they touch the row above, and
// which of them touch nothing. That leaves one or two table lookups per run. In a maze every branch that depends on the
// pixels would be mispredicted half of the time, so there are hardly any.
#include "connected_components_levels.h"
#include "truths.h"

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

// Up to 64 bytes -> bits, 1 for each that is not 0.
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
      return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    };
    return half(p) | static_cast<uint64_t>(half(p + 32)) << 32;
  }
#endif
  uint64_t word = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, p + i, 8);
    word |= (truths(bytes) * 0x0102040810204080ull >> 56) << i;  // pixel 0 in bit 0
  }
  for (; i < n; ++i) word |= static_cast<uint64_t>(p[i] != 0) << i;
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

// What two rows have to do with each other, word by word. A contact of two runs is marked at the first pixel that they
// share, where one of them begins. With 8-connectivity, runs also meet if one begins in the column after the end of the
// other: the upper row then counts as one pixel longer, and a run of the lower row meets one that begins at its end.
template <bool kEight>
struct Contacts {
  uint64_t begins, ends, above_begins;
  uint64_t first, later;  // the contacts of runs of the lower row
  uint64_t alone;         // the ends of runs of the lower row without any
  Edges edges, above_edges;
  Adder adder;

  inline void next(uint64_t here, uint64_t above) {
    uint64_t above_ends;
    edges.next(here, begins, ends);
    above_edges.next(above, above_begins, above_ends);
    const uint64_t inside = here & (kEight ? above | above_ends : above) & (begins | above_begins);
    const uint64_t after = kEight ? ends & above_begins : 0;
    // The first contact of a run becomes a zero; later ones fall on zeros, which become ones. The carry sets the end of
    // every run that has a contact inside.
    const uint64_t sum = adder.next(here, inside);
    first = (inside | after) & ~sum;
    later = (inside | after) & sum;
    alone = ends & ~(sum | after);
  }
};

inline int32_t root(int32_t* parent, int32_t label) {
  int32_t node = parent[label];  // mostly the root: every lookup waits for the stores of the last call
  while (parent[node] != node) node = parent[node] = parent[parent[node]];
  return node;
}

inline void unite(int32_t* parent, int32_t a, int32_t b) {
  const int32_t x = root(parent, a), y = root(parent, b);
  const int32_t low = x < y ? x : y;
  parent[x] = parent[y] = low;  // no effect if already merged, and cheaper than a mispredicted branch
  parent[a] = parent[b] = low;
}

#if defined(__AVX512VBMI2__)

// GCC 12 warns about uninitialized source operands in intrinsics without a mask.
constexpr __mmask16 kAll16 = 0xffff;
constexpr __mmask64 kAll64 = ~0ull;

struct Bytes {
  uint8_t at[64];
};

constexpr Bytes iota64() {
  Bytes table = {};
  for (int i = 0; i < 64; ++i) table.at[i] = static_cast<uint8_t>(i);
  return table;
}

alignas(64) constexpr Bytes kIota64 = iota64();

inline __m512i iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// Byte i = the number of ones among the bits 0 .. i.
inline __m512i ranks(uint64_t bits) {
  const __m512i word = _mm512_set1_epi64(static_cast<int64_t>(bits));
  // Eight bytes for each group of eight bits, which hold the number of ones in the groups before it, and the group.
  const __m512i groups_before =
      _mm512_setr_epi64(0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffff, 0xffffffffffff, 0xffffffffffffff);
  const __m512i lowest = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0);
  const __m512i own = _mm512_setr_epi64(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303,
                                        0x0404040404040404, 0x0505050505050505, 0x0606060606060606, 0x0707070707070707);
  const __m512i upto = _mm512_set1_epi64(static_cast<int64_t>(0xff7f3f1f0f070301));
  const __m512i before = _mm512_shuffle_epi8(_mm512_popcnt_epi64(_mm512_and_si512(word, groups_before)), lowest);
  const __m512i group = _mm512_shuffle_epi8(word, own);
  return _mm512_add_epi8(before, _mm512_popcnt_epi8(_mm512_and_si512(group, upto)));
}

// Bytes 16 k .. 16 k + 15 as integers.
template <int k>
inline __m512i widen(__m512i bytes) {
  return _mm512_maskz_cvtepu8_epi32(kAll16, _mm512_maskz_extracti32x4_epi32(0xf, bytes, k));
}

// Looks up labels by index, 0 .. most; most <= 32.
struct Nearby {
  const int32_t* labels;
  __m512i low, high;
  bool full;

  inline Nearby(const int32_t* p, int most)
      : labels(p), low(_mm512_loadu_si512(p)), high(_mm512_loadu_si512(p + 16)), full(most == 32) {}

  inline __m512i at(__m512i index) const {
    const __m512i found = _mm512_permutex2var_epi32(low, index, high);
    if (!full) return found;
    return _mm512_mask_set1_epi32(found, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), labels[32]);
  }
};

// The labels that runs of a row take from the row above, in the order of their first contacts, and the pairs of labels
// that later contacts unite.
struct Taken {
  int32_t* labels;
  int32_t *a, *b;
  int64_t pairs = 0;

  // The contacts within a word; above: the last run that begins before the word.
  inline void append(uint64_t first, uint64_t later, uint64_t above_begins, const int32_t* above) {
    const Nearby nearby(above, count_ones(above_begins));
    const __m512i rank = ranks(above_begins);
    const __m512i sources = _mm512_maskz_compress_epi8(first, rank);
    if (later) {
      // Which of the first contacts is that of the same run, counted from 1; 0: one in a word before.
      const __m512i which = _mm512_maskz_compress_epi8(later, ranks(first));
      const __m512i lower = _mm512_maskz_permutexvar_epi8(kAll64, _mm512_sub_epi8(which, _mm512_set1_epi8(1)), sources);
      const __m512i upper = _mm512_maskz_compress_epi8(later, rank);
      const uint64_t there = (1ull << count_ones(later)) - 1;
      append_pairs<0>(nearby, which, lower, upper, there);
      if (there >> 16) append_pairs<1>(nearby, which, lower, upper, there >> 16);
    }
    _mm512_storeu_si512(labels, nearby.at(widen<0>(sources)));
    _mm512_storeu_si512(labels + 16, nearby.at(widen<1>(sources)));
    const int count = count_ones(first);
    // With 8 neighbors: 32 runs that begin in the word, and one that has ended before its first pixel.
    if (count > 32) _mm512_storeu_si512(labels + 32, nearby.at(widen<2>(sources)));
    labels += count;
  }

  template <int k>
  inline void append_pairs(const Nearby& nearby, __m512i which, __m512i lower, __m512i upper, uint64_t there) {
    const __m512i index = widen<k>(which);
    const __mmask16 before = _mm512_testn_epi32_mask(index, index);
    const __m512i own = _mm512_mask_set1_epi32(nearby.at(widen<k>(lower)), before, labels[-1]);
    const __m512i other = nearby.at(widen<k>(upper));
    const __mmask16 differ = _mm512_mask_cmpneq_epi32_mask(static_cast<__mmask16>(there), own, other);
    _mm512_storeu_si512(a + pairs, _mm512_maskz_compress_epi32(differ, own));
    _mm512_storeu_si512(b + pairs, _mm512_maskz_compress_epi32(differ, other));
    pairs += count_ones(differ);
  }
};

template <bool kEight>
int32_t join(const Runs& runs) {
  const int64_t words = runs.words, most = runs.width / 2 + 1 + Runs::kPadding;
  int32_t* const taken = runs.scratch + Runs::kPadding;
  uint8_t* const alone = reinterpret_cast<uint8_t*>(taken + 3 * most);  // one bit for each run
  int32_t count = 0;
  const auto give = [&](int64_t y) {  // up to 16 new labels
    const __m512i labels = _mm512_add_epi32(iota(), _mm512_set1_epi32(count));
    _mm512_storeu_si512(runs.parent + count, labels);
    _mm512_storeu_si512(runs.top + count, _mm512_set1_epi32(static_cast<int32_t>(y)));
    return labels;
  };
  for (; count < runs.first[1]; count += 16) _mm512_storeu_si512(runs.label + count, give(0));
  count = runs.first[1];
  for (int64_t y = 1; y < runs.height; ++y) {
    if (runs.first[y] == runs.first[y + 1]) continue;
    const uint64_t* here = runs.bits + y * words;
    const uint64_t* above = here - words;
    const int32_t* above_before = runs.label + runs.first[y - 1] - 1;  // the last run that begins before the word
    Contacts<kEight> contacts = {};
    Taken take = {taken, taken + most, taken + 2 * most};
    int64_t ended = 0;     // runs that end before the word
    uint64_t pending = 0;  // bits of `alone` that do not fill a byte yet
    for (int64_t i = 0; i < words; ++i) {
      contacts.next(here[i], above[i]);
      pending |= _pext_u64(contacts.alone, contacts.ends) << ended % 8;
      __builtin_memcpy(alone + ended / 8, &pending, 8);
      const int64_t end = ended + count_ones(contacts.ends);
      pending >>= 8 * (end / 8 - ended / 8);
      ended = end;
      if (contacts.first | contacts.later) {
        take.append(contacts.first, contacts.later, contacts.above_begins, above_before);
      }
      above_before += count_ones(contacts.above_begins);
    }
    int32_t* const own = runs.label + runs.first[y];
    const int32_t* next = taken;
    for (int64_t k = 0; k < ended; k += 16) {
      uint16_t fresh;
      __builtin_memcpy(&fresh, alone + k / 8, 2);
      __m512i labels = _mm512_loadu_si512(next);
      if (fresh) {
        labels = _mm512_maskz_expand_epi32(static_cast<__mmask16>(~fresh), labels);
        labels = _mm512_mask_expand_epi32(labels, fresh, give(y));
        count += count_ones(fresh);
      }
      _mm512_storeu_si512(own + k, labels);
      next += 16 - count_ones(fresh);
    }
    for (int64_t k = 0; k < take.pairs; ++k) unite(runs.parent, take.a[k], take.b[k]);
  }
  return count;
}

// The columns of the edges of a row's runs: for each run minus its first column, and the column after its last. Writes
// up to kPadding further values: cheaper than a branch after each.
inline void columns(const uint64_t* row, int64_t words, int32_t* out) {
  uint64_t before = 0;
  for (int64_t i = 0; i < words; ++i) {
    const uint64_t edges = row[i] ^ (row[i] << 1 | before);
    const __m512i found = _mm512_maskz_compress_epi8(edges, _mm512_load_si512(kIota64.at));
    const __m512i base = _mm512_set1_epi32(static_cast<int32_t>(64 * i));
    const __mmask16 begins = before ? 0xaaaa : 0x5555;
    const auto store = [&](__m512i bytes, int32_t* to) {
      const __m512i column = _mm512_add_epi32(bytes, base);
      _mm512_storeu_si512(to, _mm512_mask_sub_epi32(column, begins, _mm512_setzero_si512(), column));
    };
    const int count = count_ones(edges);
    store(widen<0>(found), out);
    if (count > 16) {
      store(widen<1>(found), out + 16);
      store(widen<2>(found), out + 32);
      if (count > 48) store(widen<3>(found), out + 48);
    }
    out += count;
    before = row[i] >> 63;
  }
}

#else

template <bool kEight>
int32_t join(const Runs& runs) {
  int32_t* const parent = runs.parent;
  const int64_t words = runs.words;
  int32_t* const a = runs.scratch;
  int32_t* const b = a + runs.width / 2 + 1 + Runs::kPadding;
  int32_t count = 0;
  const auto give = [&](int32_t* label, int64_t y) {
    *label = parent[count] = count;
    runs.top[count++] = static_cast<int32_t>(y);
  };
  for (int32_t run = 0; run < runs.first[1]; ++run) give(runs.label + run, 0);
  for (int64_t y = 1; y < runs.height; ++y) {
    if (runs.first[y] == runs.first[y + 1]) continue;
    const uint64_t* here = runs.bits + y * words;
    const uint64_t* above = here - words;
    int32_t* own = runs.label + runs.first[y];  // of the first run that ends in the word
    int32_t* own_before = own - 1;              // of the last run that begins before the word
    const int32_t* above_before = runs.label + runs.first[y - 1] - 1;
    Contacts<kEight> contacts = {};
    int64_t pairs = 0;
    for (int64_t i = 0; i < words; ++i) {
      contacts.next(here[i], above[i]);
      for (uint64_t bits = contacts.alone; bits; bits &= bits - 1) {
        give(own + count_ones(contacts.ends & (bits ^ (bits - 1))) - 1, y);
      }
      for (uint64_t bits = contacts.first; bits; bits &= bits - 1) {
        const uint64_t upto = bits ^ (bits - 1);
        own_before[count_ones(contacts.begins & upto)] = above_before[count_ones(contacts.above_begins & upto)];
      }
      for (uint64_t bits = contacts.later; bits; bits &= bits - 1) {
        const uint64_t upto = bits ^ (bits - 1);
        a[pairs] = own_before[count_ones(contacts.begins & upto)];
        b[pairs] = above_before[count_ones(contacts.above_begins & upto)];
        pairs += a[pairs] != b[pairs];
      }
      own += count_ones(contacts.ends);
      own_before += count_ones(contacts.begins);
      above_before += count_ones(contacts.above_begins);
    }
    for (int64_t k = 0; k < pairs; ++k) unite(parent, a[k], b[k]);
  }
  return count;
}

inline void columns(const uint64_t* row, int64_t words, int32_t* out) {
  // Writes sign * (`from` + the positions of the set bits) to every other integer, and up to 7 further values.
  const auto write = [](uint64_t bits, int32_t from, int32_t sign, int32_t* to) {
    int32_t* const end = to + 2 * count_ones(bits);
    while (bits) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k, to += 2) {
        *to = sign * (from + (bits ? __builtin_ctzll(bits) : 0));
        bits &= bits - 1;
      }
    }
    return end;
  };
  int32_t *begin = out, *end = out + 1;
  Edges edges;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t begins, ends;
    edges.next(row[i], begins, ends);
    begin = write(begins, static_cast<int32_t>(64 * i), -1, begin);
    end = write(ends, static_cast<int32_t>(64 * i), 1, end);
  }
}

#endif

typedef int32_t I4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t U4 __attribute__((vector_size(16), aligned(4), may_alias));

inline void add(Extent* extent, I4 other) {
  I4* const lanes = reinterpret_cast<I4*>(extent);
  const I4 was = *lanes, larger = was > other ? was : other;
  const U4 sum = reinterpret_cast<U4>(was) + reinterpret_cast<U4>(other);
  *lanes = __builtin_shufflevector(larger, reinterpret_cast<I4>(sum), 0, 1, 6, 7);
}

void measure(const int32_t* final, int32_t labels, const Runs& runs, Extent* parts, Extent* extents, int32_t* bottom) {
  typedef int64_t L2 __attribute__((vector_size(16)));
  for (int64_t y = 0; y < runs.height; ++y) {
    columns(runs.bits + y * runs.words, runs.words, runs.scratch);
    int32_t* const label = runs.label + runs.first[y];
    const int32_t count = runs.first[y + 1] - runs.first[y];
    for (int32_t k = 0; k < count; ++k) {
      const int32_t part = label[k];
      label[k] = final[part];
      int64_t edges;
      __builtin_memcpy(&edges, runs.scratch + 2 * k, 8);
      add(parts + part, reinterpret_cast<I4>(L2{edges, edges}));
      runs.bottom[part] = static_cast<int32_t>(y + 1);
    }
  }
  for (int32_t i = 0; i < labels; ++i) {
    const int32_t label = final[i];
    add(extents + label, *reinterpret_cast<const I4*>(parts + i));
    bottom[label] = bottom[label] > runs.bottom[i] ? bottom[label] : runs.bottom[i];
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
  const int32_t* label = runs.label;
#if defined(__AVX512VBMI2__)
  uint8_t* kept_runs = reinterpret_cast<uint8_t*>(runs.label);  // overwrites labels that have been read
  for (int32_t k = 0; k < runs.first[runs.height]; ++k) kept_runs[k] = keep[label[k]];
#endif
  for (int64_t y = 0; y < runs.height; ++y, out += runs.width) {
    Edges edges;
    Adder adder;
    for (int64_t i = 0; i < runs.words; ++i) {
      const uint64_t word = *bits++;
      uint64_t begins, ends, dropped = 0;
      edges.next(word, begins, ends);
#if defined(__AVX512VBMI2__)
      const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept_runs));
      dropped = _pdep_u64(_mm256_testn_epi8_mask(next, next), begins);
      kept_runs += count_ones(begins);
#else
      for (; begins; begins &= begins - 1) dropped |= (begins & -begins) & (uint64_t{keep[*label++]} - 1);
#endif
      const uint64_t kept = word & adder.next(word, dropped);  // adding its first bit removes a run
      const int64_t left = runs.width - 64 * i;
      unpack(invert ? ~kept : kept, left < 64 ? left : 64, out + 64 * i);
    }
  }
}

constexpr ComponentKernels kKernels = {scan, join<false>, join<true>, measure, paint, keep};

}  // namespace
}  // namespace namedmask::cpu
