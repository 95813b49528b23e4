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
//             Pixels are counted exactly and scores added in order: bit-identical on every level, for any number of
//             threads and any batch.
// Cost        one pass over the n P bytes and, per image of p pixels, n^2 / 2 passes over rows of p bits; n P / 8 bytes
//             of memory.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

enum VoteReason : uint8_t { kEmpty = 1, kFullHeight = 2, kFullWidth = 4 };

namespace cpu {

void vote_masks(const TensorView& masks, const TensorView& offsets, const TensorView& shapes, const TensorView& winner,
                const TensorView& kept, const TensorView& reasons, const TensorView& scores);

}  // namespace cpu
}  // namespace namedmask
