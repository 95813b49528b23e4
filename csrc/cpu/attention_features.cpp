// SPDX-License-Identifier: MIT
// Argument checks, and the distribution of heads and query blocks over threads. attention_features_kernel.h has the
// arithmetic.
#include "namedmask/attention_features.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attention_features_levels.h"
#include "level.h"
#include "threads.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "attention_features";
constexpr int64_t kNormTokens = 64;  // tokens per piece of work on key norms

const AttentionKernels& kernels() { return NMK_BEST_OR_BF16(attention_features); }

// Checks that offsets run from 0 to `tokens` without decreasing, and that every tap is inside every sequence that is
// not empty. Returns the length of the longest sequence.
int64_t longest_sequence(const TensorView& offsets, int64_t tokens, const TensorView& taps, bool tapped) {
  const int64_t count = offsets.shape[0] - 1;
  const auto* at = offsets.as<int32_t>();
  if (count < 0 || at[0] != 0 || at[count] != tokens) {
    throw std::invalid_argument(std::string(kOp) + ": offsets must run from 0 to the " + std::to_string(tokens) +
                                " tokens of qkv, but " +
                                (count < 0 ? std::string("are empty")
                                           : "run from " + std::to_string(at[0]) + " to " + std::to_string(at[count])));
  }
  int32_t highest = -1;
  for (int64_t r = 0; tapped && r < taps.shape[0]; ++r) highest = std::max(highest, taps.as<int32_t>()[r]);
  int64_t longest = 0;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t length = int64_t{at[b + 1]} - at[b];
    if (length < 0) {
      throw std::invalid_argument(std::string(kOp) + ": offsets must not decrease, but sequence " + std::to_string(b) +
                                  " runs from " + std::to_string(at[b]) + " to " + std::to_string(at[b + 1]));
    }
    if (length > 0 && highest >= length) {
      throw std::invalid_argument(std::string(kOp) + ": tap_rows must lie inside every sequence, but row " +
                                  std::to_string(highest) + " is asked for and sequence " + std::to_string(b) +
                                  " has " + std::to_string(length) + " tokens");
    }
    longest = std::max(longest, length);
  }
  return longest;
}

// One head of one sequence from query, key or tapped row `first` on.
struct Piece {
  int64_t sequence, head, first;
};

// Aligned to cache lines, for the vector loads of the inner loops.
struct Release {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Release>;
Floats aligned_floats(int64_t n) { return Floats(new (std::align_val_t{64}) float[n]); }

}  // namespace

void attention_features(const TensorView& qkv, const TensorView& offsets, const TensorView& taps, double scale,
                        const std::optional<TensorView>& output, const std::optional<TensorView>& rows,
                        const std::optional<TensorView>& lse, const std::optional<TensorView>& key_norms) {
  const DType dtype = qkv.dtype == DType::kBFloat16 || qkv.dtype == DType::kFloat16 ? qkv.dtype : DType::kFloat32;
  expect(kOp, "qkv", qkv, dtype, {-1, 3, -1, -1});
  expect(kOp, "offsets", offsets, DType::kInt32, {-1});
  expect(kOp, "taps", taps, DType::kInt32, {-1});
  const int64_t tokens = qkv.shape[0], heads = qkv.shape[2], dim = qkv.shape[3], n_taps = taps.shape[0];
  if (dim > kMaxDim) {
    throw std::invalid_argument(std::string(kOp) + ": qkv must have heads of at most " + std::to_string(kMaxDim) +
                                " dimensions, but has " + std::to_string(dim));
  }
  if (output) expect(kOp, "output", *output, dtype, {tokens, heads, dim});
  if (rows) expect(kOp, "rows", *rows, DType::kFloat32, {tokens, heads, n_taps});
  if (lse) expect(kOp, "lse", *lse, DType::kFloat32, {tokens, heads});
  if (key_norms) expect(kOp, "key_norms", *key_norms, DType::kFloat32, {tokens});
  const int64_t longest = longest_sequence(offsets, tokens, taps, rows.has_value());

  const AttentionKernels& run = kernels();
  const Stored stored = dtype == DType::kBFloat16  ? Stored::kBFloat16
                        : dtype == DType::kFloat16 ? Stored::kFloat16
                                                   : Stored::kFloat32;
  const int64_t element = stored == Stored::kFloat32 ? 4 : 2;
  const auto* at = offsets.as<int32_t>();
  std::vector<Piece> blocks, queries, tapped;
  std::vector<int64_t> first_block(offsets.shape[0]);  // of a sequence; its heads are consecutive
  for (int64_t b = 0; b + 1 < offsets.shape[0]; ++b) {
    const int64_t count = at[b + 1] - at[b];
    first_block[b] = static_cast<int64_t>(blocks.size());
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t first = 0; (output || lse) && first < count; first += kKeys) blocks.push_back({b, h, first});
      for (int64_t first = 0; (output || lse) && first < count; first += kQueries) queries.push_back({b, h, first});
      for (int64_t r = 0; rows && count && r < n_taps; r += kTapRows) tapped.push_back({b, h, r});
    }
  }
  const int64_t norm_pieces = key_norms ? (tokens + kNormTokens - 1) / kNormTokens : 0;
  const auto n_blocks = static_cast<int64_t>(blocks.size()), n_queries = static_cast<int64_t>(queries.size()),
             n_tapped = static_cast<int64_t>(tapped.size());
  const int64_t pieces = std::max(n_blocks, n_queries + n_tapped) + norm_pieces;
  const int threads = static_cast<int>(std::clamp<int64_t>(pieces, 1, thread_count()));
  const int64_t floats = scratch_floats(rows ? longest : 0), block_floats = packed_floats(dim);
  const Floats scratch = aligned_floats(threads * floats), packed = aligned_floats(n_blocks * block_floats);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const auto head_of = [&](const Piece& piece) {
      const int64_t start = (3 * int64_t{at[piece.sequence]} * heads + piece.head) * dim;
      return AttentionHead{qkv.as<char>() + start * element,
                           stored,
                           at[piece.sequence + 1] - at[piece.sequence],
                           heads,
                           dim,
                           static_cast<float>(scale),
                           scratch.get() + omp_get_thread_num() * floats};
    };
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < n_blocks; ++i) {
      run.pack(head_of(blocks[i]), blocks[i].first, output.has_value(), packed.get() + i * block_floats);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < n_queries; ++i) {
      const Piece& piece = queries[i];
      const AttentionHead head = head_of(piece);
      const int64_t first = at[piece.sequence] * heads + piece.head;
      const int64_t block = first_block[piece.sequence] + piece.head * ((head.count + kKeys - 1) / kKeys);
      run.attend(head, packed.get() + block * block_floats, piece.first, std::min(head.count, piece.first + kQueries),
                 output ? output->as<char>() + first * dim * element : nullptr,
                 lse ? lse->as<float>() + first : nullptr);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < n_tapped; ++i) {
      const Piece& piece = tapped[i];
      float* out = rows->as<float>() + (at[piece.sequence] * heads + piece.head) * n_taps + piece.first;
      run.tap(head_of(piece), taps.as<int32_t>() + piece.first, std::min(kTapRows, n_taps - piece.first), out,
              heads * n_taps);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < norm_pieces; ++i) {
      const int64_t first = i * kNormTokens;
      run.key_norms(qkv.as<char>() + 3 * first * heads * dim * element, stored, std::min(kNormTokens, tokens - first),
                    heads, dim, key_norms->as<float>() + first);
    }
  }
}

}  // namespace namedmask::cpu
