// SPDX-License-Identifier: MIT
// Refinement of masks by a random walk over the affinity of the features, independently for every image of a packed
// batch.
//
// Definition  Rows of the features are divided by max(norm, 1e-12). S_ij = exp(sharpness (cosine of i and j - 1)), P is
//             S with its rows divided by their sums; out = P^steps masks. A row of zeros has cosine 0 with all tokens.
//             Sharpness is from 0 to 1e6: cosines are rounded by about 1e-6.
// Arrays      masks float32 [T, M]; features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in
//             RaggedShape; out float32 [T, M], which must not overlap the masks. All contiguous.
// Errors      std::invalid_argument for a wrong array or setting, and for features that are not finite (the message
//             names the first image); out is then unspecified. Masks may contain any values;
//             NaN and Inf spread over their mask.
// Accuracy    float32 throughout; 0 steps copy the masks.
// Threads     OpenMP, one region: over images, and over groups of rows of tiles if there is only one image. Results are
//             bit-identical for any number of threads and any batch. Levels differ by rounding.
// Cost        per image of n tokens n^2 C flops and n^2 / 2 exponentials, since S is symmetric, and n^2 2 M flops per
//             step. With more than one step, the tiles of S above its diagonal are kept while they fit 32 MB, that is
//             all of them up to 4,032 tokens; every step computes the others again. Memory per thread, kept for its
//             next call (64 MB at most): 4 n C bytes, 12 n (M + 8) and 2 n (n + 96), the last at most 32 MB; a single
//             image takes 40 n (M + 8) for the second.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void random_walk(const TensorView& masks, const TensorView& features, const TensorView& offsets,
                 const TensorView& shapes, const TensorView& out, int64_t steps, double sharpness);

}  // namespace namedmask::cpu
