// SPDX-License-Identifier: MIT
// SelfMask's spectral clustering of every image of a packed batch of feature grids, for several numbers of clusters.
//
// Definition  Rows are divided by max(norm, 1e-12). G holds their products, m its least and M its largest entry;
//             A = (G - m) / (M - m), D is the diagonal of A's row sums. v_2, v_3, ... are the vectors of the next
//             smallest eigenvalues of (D - A) v = lambda D v after the constant one, v' D v = 1. The k clusters are
//             those of k-means on the points (v_2[i], ..., v_k[i]), in float64.
// k-means     Best of kRestarts runs by the sum of squared distances, the first of equals; k-means++ seeds, drawn by
//             splitmix64 from (seed, k, run); the nearest center, of equals the first; a center that loses its tokens
//             stays; up to kRounds rounds, or until no label changes. Labels are numbered in the order in which they
//             first occur, so token 0 has label 0.
// Few         Where fewer than k points differ, fewer than k labels occur. All labels are 0 where M - m < 1e-6 (all
//             tokens alike) and for k = 1. A row of zeros whose affinities are all 0 stands at the origin.
// Accuracy    unit rows in float32, everything after in float64, but that A's products have factors of 29 bits, or of
//             53 where M - m is below 1 / 64; vectors are iterated to a residual of 1e-6, or as far as kMaxProducts
//             products per vector go.
// Arrays      features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape; counts int32
//             [K], the numbers k, each from 1 to 64; labels int32 [T, K]. All contiguous.
// Errors      std::invalid_argument for a wrong array or count and for features that are not finite (first image
//             named); the labels are then unspecified.
// Threads     OpenMP, one region: over images, and over parts of an image's work where threads are left. The bits of a
//             result depend neither on the threads nor on the batch nor on the instruction level.
// Cost        per image of n tokens n^2 C flops, with AVX-512 VNNI of bytes at four times the rate and again C for each
//             pair that may be the least, and 4 n C flops per product; no array of n x n. Per thread 8 n C (6 n C with
//             VNNI) + 8 n (products + 3 max k) + 320 n K bytes.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {
namespace cpu {

void spectral_clusters(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& counts, const TensorView& labels, int64_t seed);

}  // namespace cpu

// The part after m and M, on a CUDA device: offsets, shapes and counts stay on the CPU, everything else lies on one
// device, is contiguous and must live until `stream` has passed it. Vectors are found one after the other, not
// together, to a residual of 1e-8 or as far as 192 products each go; the sums of k-means are taken in another order.
//
// unit       float32 [T, C], the unit vectors, C a multiple of 4 (zeros at the end do no harm)
// ranges     float32 [B, 2], m and M of each image
// workspace  float64 [spectral_clusters_workspace(...)], scratch
// At most 64 counts. Three launches for every 64 images: a thread block an image, a run of k-means, an image and k.
namespace cuda {

int64_t spectral_clusters_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                                    int64_t tokens, int64_t channels);

void spectral_clusters(const TensorView& unit, const TensorView& ranges, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& counts, const TensorView& labels,
                       const TensorView& workspace, int64_t seed, Stream stream);

}  // namespace cuda
}  // namespace namedmask
