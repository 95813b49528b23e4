// SPDX-License-Identifier: MIT
// TokenCut's normalized cut of every image of a packed batch of feature grids.
//
// Definition  Rows are divided by max(norm, 1e-12). A_ij = 1 where the cosine of i and j exceeds tau, else eps; D is
//             the diagonal of A's row sums. vector = v of the second smallest eigenvalue of (D - A) v = value D v, with
//             v' D v = 1 and its largest absolute entry, the seed, positive (entries within 1e-5 of the largest count
//             as equal, the first is taken). partition = v above its mean; foreground = the 4-connected component of
//             the partition that holds the seed. A tau of 1 or more connects nothing, not even a token with itself.
// Symmetric   Where all tokens are alike - affinities between different tokens are all equal, and so are the
//             affinities of the tokens with themselves - every vector orthogonal to D 1 is a second eigenvector and no
//             token stands out: vector 0, partition and foreground empty, seed -1, residual 0, iterations 0; value is
//             their common eigenvalue (1 for constant features). Images of 0 and 1 token likewise, value 1.
// Accuracy    Cosines in float32, everything after in float64. residual = |D^-1/2 ((D - A) v - value D v)|: some
//             eigenvalue lies within it of `value`, and v is off by about residual / (gap to the other eigenvalues).
//             Tokens that fall apart into several groups have gaps of 10 eps: hence a small default tolerance, which
//             costs an iteration or two. A residual above `tolerance` says that max_iterations came first.
// Arrays      features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape;
//             vector float32 [T], partition and foreground bool [T]; value and residual float64 [B], iterations and
//             seed int32 [B], the seed counted within its image. All contiguous, outputs allocated by the caller.
// Errors      std::invalid_argument for a wrong array or setting and for features that are not finite (first image
//             named); the outputs are then unspecified.
// Threads     OpenMP, one region: over images, or over tiles of the affinity when there is one image. The bits of a
//             result depend neither on the threads nor on the batch. Levels differ by the rounding of cosines.
// Cost        per image of n tokens n^2 C flops and n^2 / 8 lookups per iteration; per thread 8 n C + n^2 / 8 +
//             8 n iterations bytes. With AVX-512 VNNI products are of 16-bit integers, twice as fast, and 4 n C bytes
//             more; the floats decide whatever the integers' rounding leaves open, so the bits are the floats'.
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

// The part from the affinity on, on a CUDA device: offsets and shapes stay on the CPU, everything else lies on one
// device, is contiguous and must live until `stream` has passed it.
//
// bits       int32 [sum over the images of p^2 / 32], p their tokens rounded up to a multiple of 128: for each image
//            [p / 128, p, 4], bit k % 32 of word k / 32 of group g and row i set where i is connected to 128 g + k;
//            symmetric, 0 beyond the image's tokens.
// workspace  float64 [sum over the images of (s + 4) p + 6 (s + 1)], s = min(max_iterations, tokens - 1); scratch.
// The other arrays are as above; what is not finite in the features was to be refused before. One launch for every 100
// images, a thread block an image. The bits of a result do not depend on the batch.
namespace cuda {

void normalized_cut(const TensorView& bits, const TensorView& offsets, const TensorView& shapes,
                    const TensorView& vector, const TensorView& value, const TensorView& residual,
                    const TensorView& iterations, const TensorView& partition, const TensorView& seed,
                    const TensorView& workspace, double eps, double tolerance, int64_t max_iterations, Stream stream);

}  // namespace cuda
}  // namespace namedmask
