// SPDX-License-Identifier: MIT
// Refinement of masks by a random walk over the affinity of the features, every image of a packed batch by itself.
//
// Definition  Rows of the features are divided by max(norm, 1e-12). S_ij = exp(sharpness (cosine of i and j - 1)), P is
//             S with its rows divided by their sums; out = P^steps masks. A row of zeros has cosine 0 with all tokens.
// Arrays      masks float32 [T, M]; features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in
//             RaggedShape; out float32 [T, M], which may not overlap the masks. All contiguous.
// Errors      std::invalid_argument for a wrong array or setting and for features that are not finite (first image
//             named); out is then unspecified. Masks may hold anything; NaN spreads.
// Accuracy    float32 throughout; 0 steps copy the masks.
// Threads     OpenMP, one region: over images, or over groups of rows of tiles when there is one image. The bits of a
//             result depend neither on the threads nor on the batch. Levels differ by rounding.
// Cost        per image of n tokens and step n^2 (C + 2 M) flops, S being symmetric, and n^2 / 2 exponentials; never
//             more of S than a tile per thread. Memory: 4 n C bytes, and 4 n (M + 32) for each of up to eight threads.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void random_walk(const TensorView& masks, const TensorView& features, const TensorView& offsets,
                 const TensorView& shapes, const TensorView& out, int64_t steps, double sharpness);

}  // namespace namedmask::cpu
