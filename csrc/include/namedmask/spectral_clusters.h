// SPDX-License-Identifier: MIT
// SelfMask's spectral clustering of every image of a packed batch of feature grids, for several numbers of clusters.
//
// Definition  Rows are divided by max(norm, 1e-12). G holds their dot products, m its smallest and M its largest entry;
//             A = (G - m) / (M - m), D is the diagonal matrix of A's row sums. v_2, v_3, ... are the eigenvectors of
//             the next smallest eigenvalues of (D - A) v = lambda D v after the constant one, v' D v = 1. The k
//             clusters are those of k-means on the points (v_2[i], ..., v_k[i]), in float64.
// k-means     Best of kRestarts runs by the sum of squared distances, the first among equals; k-means++ seeding with
//             splitmix64 random numbers from (seed, k, run). Each point goes to the nearest center, the first among
//             equals; a center that loses its points stays. At most kRounds rounds, or until no label changes. Labels
//             are numbered in the order of their first occurrence, so token 0 has label 0.
// Degenerate  If fewer than k points differ, fewer than k labels occur. All labels are 0 if M - m < 1e-6 (all tokens
//             alike) and for k = 1. A row of zeros whose affinities are all 0 is a point at the origin.
// Accuracy    unit rows in float32, the rest in float64, except that the products with A use factors of 29 bits, or of
//             53 if M - m is below 1 / 64. Eigenvectors are iterated to a residual of 1e-6, or for at most kMaxProducts
//             products per vector.
// Arrays      features float32 [T, C]; offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape; counts int32
//             [K], the numbers k, each from 1 to 64; labels int32 [T, K]. All contiguous.
// Errors      std::invalid_argument for a wrong array or count, and for features that are not finite (the message names
//             the first image); the labels are then unspecified.
// Threads     OpenMP, one region: over images, and over parts of an image where threads are idle. Results are
//             bit-identical for any number of threads, batch and instruction level.
// Cost        per image of n tokens n^2 C flops, or with AVX-512 VNNI products of bytes at four times the rate plus C
//             flops for each pair that may be the smallest; and 4 n C flops per product. No array of n x n. Memory per
//             thread: 8 n C (6 n C with VNNI) + 8 n (products + 3 max k) + 320 n K bytes.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {
namespace cpu {

void spectral_clusters(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& counts, const TensorView& labels, int64_t seed);

}  // namespace cpu

// The part after m and M, on a CUDA device: offsets, shapes and counts are on the CPU, all other arrays are contiguous
// on one device and must stay alive until the work on `stream` is done. Eigenvectors are found one after another, not
// together, to a residual of 1e-8 or for at most 192 products each; the sums of k-means have a different order.
//
// unit       float32 [T, C], aligned to 16 bytes, the unit vectors, C a multiple of 4 (zeros at the end change nothing)
// ranges     float32 [B, 2], m and M of each image
// workspace  float64 [spectral_clusters_workspace(...)], scratch
// At most 64 counts. Three launches per 64 images, with one cluster of thread blocks (or one block) per image, and one
// block per run of k-means and per image and k.
namespace cuda {

int64_t spectral_clusters_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                                    int64_t tokens, int64_t channels);

void spectral_clusters(const TensorView& unit, const TensorView& ranges, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& counts, const TensorView& labels,
                       const TensorView& workspace, int64_t seed, Stream stream);

}  // namespace cuda
}  // namespace namedmask
