// SPDX-License-Identifier: MIT
// The parts of attention_features that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kQueries = 192;  // queries that share a pass over the keys; a multiple of kRows at every level
constexpr int64_t kKeys = 64;      // keys per packed block
constexpr int64_t kTapRows = 12;   // tapped queries per call; a multiple of kRows at every level
constexpr int64_t kMaxDim = 256;

enum class Stored { kFloat32, kBFloat16, kFloat16 };

// One head of one sequence.
struct AttentionHead {
  const void* qkv;  // the sequence's first token, this head's query; then 3 * heads * dim elements to the next token
  Stored stored;
  int64_t count, heads, dim;
  float scale;
  float* scratch;  // scratch_floats()
};

struct AttentionKernels {
  // Packs a block of at most kKeys keys from `first` on, and optionally their values, for `attend`: packed_floats().
  void (*pack)(const AttentionHead& head, int64_t first, bool values, float* block);
  // Queries [begin, end), at most kQueries. `output` (of the input's type, `heads * dim` elements per token) and `lse`
  // (`heads` floats per token) point to this head's first query; null means not computed. `packed` are all key blocks
  // of the head.
  void (*attend)(const AttentionHead& head, const float* packed, int64_t begin, int64_t end, void* output, float* lse);
  // rows[t * stride + r] = the weight that query taps[r] gives to key t; r < n_taps, at most kTapRows.
  void (*tap)(const AttentionHead& head, const int32_t* taps, int64_t n_taps, float* rows, int64_t stride);
  // norms[t] = sum of squares of the keys' heads * dim elements of token t.
  void (*key_norms)(const void* qkv, Stored stored, int64_t count, int64_t heads, int64_t dim, float* norms);
};

// Floats of a packed block: keys, a factor per key, and values padded to vectors of the widest level.
static constexpr int64_t packed_floats(int64_t dim) { return kKeys * (dim + 1 + (dim + 15) / 16 * 16); }

// Floats of scratch per thread; the longest tapped sequence has `tapped` tokens.
static constexpr int64_t scratch_floats(int64_t tapped) {
  const int64_t attend = 2 * kQueries * kMaxDim + kTapRows * kKeys + kQueries * (2 + 2 * 16);
  const int64_t tap = kTapRows * kMaxDim + kKeys * kMaxDim + kTapRows * (tapped + kKeys);
  return ((attend > tap ? attend : tap) + 15) / 16 * 16;
}

NMK_DECLARE_LEVELS(AttentionKernels, attention_features);

}  // namespace namedmask::cpu
