// SPDX-License-Identifier: MIT
// SelfMask's vote: the candidate mask of an image that agrees most with the other candidates. A packed batch of images.
//
// Definition  A candidate does not vote if it is empty, or spans the full height (it has pixels in the first and in the
//             last row) or the full width. If none is left, all vote. score = sum over the voting candidates, including
//             itself, of |a and b| / (|a or b| + 1e-7); 0 for those that do not vote. The winner has the highest score,
//             the first among equals.
// Arrays      masks bool [n P] (bytes 0 or 1): image b, of p pixels, has its n masks [n, h, w] from byte n offsets[b]
//             on; offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape, over P pixels. winner int32 [B];
//             kept bool [B, n], which candidates vote; reasons uint8 [B, n], why a candidate should not vote: a sum of
//             kEmpty, kFullHeight, kFullWidth; scores float64 [B, n]. All contiguous; the caller allocates outputs,
//             which are fully written.
// Empty       an image without pixels has empty candidates; without candidates the winner is -1.
// Threads     OpenMP over masks, then over rows of the table of pairs, in one region; one thread for up to 16 MB.
//             Pixels are counted exactly and scores added in order: bit-identical on every level and device, for any
//             number of threads and any batch.
// Cost        CPU: one pass over the n P bytes and, per image of p pixels, n^2 / 2 passes over rows of p bits; n P / 8
//             bytes of memory. CUDA: g passes over the bytes for g = (n + 4) / 32, rounded up; g (g + 1) / 2 launches
//             per 64 images and one per batch.
#pragma once

#include <string>

#include "namedmask/tensor_view.h"

namespace namedmask {

enum VoteReason : uint8_t { kEmpty = 1, kFullHeight = 2, kFullWidth = 4 };

// Checks the arguments of a vote, all but offsets and shapes on `device`. Returns the batch; without candidates, only
// its count.
inline RaggedShape expect_vote(const TensorView& masks, const TensorView& offsets, const TensorView& shapes,
                               const TensorView& winner, const TensorView& kept, const TensorView& reasons,
                               const TensorView& scores, Device device) {
  const char* op = "vote_masks";
  expect(op, "kept", kept, DType::kBool, {-1, -1}, device);
  const int64_t images = kept.shape[0], n = kept.shape[1], bytes = masks.size();
  if (n ? bytes % n : bytes) {
    throw std::invalid_argument(std::string(op) + ": masks must be a multiple of the " + std::to_string(n) +
                                " candidates, but are " + std::to_string(bytes));
  }
  expect(op, "shapes", shapes, DType::kInt32, {images, 2});
  expect(op, "winner", winner, DType::kInt32, {images}, device);
  expect(op, "reasons", reasons, DType::kUInt8, {images, n}, device);
  expect(op, "scores", scores, DType::kFloat64, {images, n}, device);
  return n ? expect_ragged(op, offsets, shapes, bytes / n) : RaggedShape{nullptr, nullptr, images};
}

namespace cpu {

void vote_masks(const TensorView& masks, const TensorView& offsets, const TensorView& shapes, const TensorView& winner,
                const TensorView& kept, const TensorView& reasons, const TensorView& scores);

}  // namespace cpu

// The same on a CUDA device. Offsets and shapes are on the CPU, the other arrays on one device. The call only enqueues
// work on `stream`; the arrays must stay alive until it is done.
namespace cuda {

// masks as above, or bool [P, n], one column per candidate; workspace int32 [B, n + 4, n + 4] is scratch.
void vote_masks(const TensorView& masks, const TensorView& offsets, const TensorView& shapes, const TensorView& winner,
                const TensorView& kept, const TensorView& reasons, const TensorView& scores,
                const TensorView& workspace, Stream stream);

}  // namespace cuda
}  // namespace namedmask
