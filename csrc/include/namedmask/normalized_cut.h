// SPDX-License-Identifier: MIT
// TokenCut's normalized cut of every image of a packed batch of feature grids.
//
// Definition  Rows are divided by max(norm, 1e-12). A_ij = 1 where the cosine of i and j exceeds tau, else eps; D is
//             the diagonal matrix of A's row sums. vector = v of the second smallest eigenvalue of (D - A) v = value D
//             v, with v' D v = 1 and its largest absolute entry, the seed, positive (entries within 1e-5 of the largest
//             count as equal; the first one is the seed). partition = v above its mean; foreground = the 4-connected
//             component of the partition that contains the seed. A tau of 1 or more connects nothing, not even a token
//             with itself.
// Symmetric   If the affinities between different tokens are all equal, and so are the affinities of the tokens with
//             themselves, every vector orthogonal to D 1 is a second eigenvector. Then vector is 0, partition and
//             foreground are empty, seed is -1, residual and iterations are 0, and value is the common eigenvalue (1
//             for constant features). The same holds for images of 0 and 1 token, with value 1.
// Accuracy    Cosines in float32, the rest in float64. residual = |D^-1/2 ((D - A) v - value D v)|: some eigenvalue is
//             within it of `value`, and the error of v is about residual / (gap to the other eigenvalues). Tokens that
//             form several separate groups have gaps of 10 eps; hence the small default tolerance, which costs one or
//             two iterations. A residual above `tolerance` means that max_iterations was reached first.
// Arrays      features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape; vector float32
//             [T], partition and foreground bool [T]; value and residual float64 [B], iterations and seed int32 [B];
//             the seed is an index within its image. All contiguous; the caller allocates outputs.
// Errors      std::invalid_argument for a wrong array or setting, and for features that are not finite (the message
//             names the first image); the outputs are then unspecified.
// Threads     OpenMP, one region: over images, and over tiles of the affinity if there is only one image. Results are
//             bit-identical for any number of threads and any batch. Levels differ by the rounding of cosines.
// Cost        per image of n tokens n^2 C flops, and per iteration n^2 / 8 table lookups, with AVX-512 n^2 / 4, eight
//             per instruction. Memory per thread, kept for its next call (64 MB at most): 8 n C + n^2 / 8 + 8 n
//             iterations bytes. With AVX-512 VNNI the products are of bytes, four times as fast, then of 16-bit
//             integers for the few percent of the pairs that bytes leave in doubt, or, where these are too many, of
//             16-bit integers alone, twice as fast; they take at most 4 n C bytes. Floats decide where the integers'
//             rounding leaves doubt, so the bits are those of the floats.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

struct CutSettings {
  double tau = 0.2, eps = 1e-5, tolerance = 1e-8;
  int64_t max_iterations = 128;
};

namespace cpu {

void normalized_cut(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                    const TensorView& vector, const TensorView& value, const TensorView& residual,
                    const TensorView& iterations, const TensorView& partition, const TensorView& seed,
                    const TensorView& foreground, const CutSettings& settings);

}  // namespace cpu

// The part after the affinity, on a CUDA device: offsets and shapes are on the CPU, all other arrays are contiguous on
// one device and must stay alive until the work on `stream` is done.
//
// bits       int32 [sum over the images of p^2 / 32], p the number of tokens rounded up to a multiple of 128. For each
//            image [p / 128, p, 4]: bit k % 32 of word k / 32 of group g and row i is set if i is connected to
//            128 g + k. Symmetric, and 0 beyond the image's tokens.
// workspace  float64 [sum over the images of (s + 4) p + 5 s + 2 + 64 (s + 2)], s = min(max_iterations, tokens - 1);
//            scratch.
// The other arrays are as above; results from features that are not finite mean nothing. One launch per 100 images, one
// cluster of blocks per image where there are any, else one block. Results are bit-identical for any batch.
namespace cuda {

void normalized_cut(const TensorView& bits, const TensorView& offsets, const TensorView& shapes,
                    const TensorView& vector, const TensorView& value, const TensorView& residual,
                    const TensorView& iterations, const TensorView& partition, const TensorView& seed,
                    const TensorView& workspace, double eps, double tolerance, int64_t max_iterations, Stream stream);

}  // namespace cuda
}  // namespace namedmask
