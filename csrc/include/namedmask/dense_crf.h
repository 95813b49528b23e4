// SPDX-License-Identifier: MIT
// Mean-field inference in a fully connected CRF with Gaussian edges (Kraehenbuehl and Koltun, NIPS 2011) over a packed
// batch of images of any sizes, any number of labels.
//
// Arrays     probabilities float32 [P, L] and image uint8 [P, 3] (RGB), one image after another in raster order;
//            offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P, L]. All contiguous; out
//            is allocated by the caller and fully written.
// Model      unary -log(clip(p, 1e-5, 1)); two Potts terms, whose kernels are Gaussians of place and of place and
//            color. A kernel K, its diagonal included, is used as N^-1/2 K N^-1/2 with N = diag(K 1). The marginals
//            start as softmax(-unary); an update is softmax(-unary + weight K marginals, summed over the terms).
// Filters    the Gaussian of place on a grid of cubic B-splines, within 0.002 of the exact one's peak; that of place
//            and color on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), with axes x, y, r, g, b.
// Empty      an empty batch, images of 0 x n pixels and L = 0 are fine.
// Errors     std::invalid_argument for probabilities that are not finite and for sigmas so small that the lattice
//            has no name for some vertex (an image 3000 sigmas wide), naming the image.
// Aliasing   out must not overlap the inputs.
// Threads    OpenMP over images; the result depends neither on the number of threads nor on the batch, to the bit.
//            Instruction levels round differently.
// Cost       for each update and pixel about 24 L + 100 operations; memory for each pixel 48 bytes and for each vertex
//            of the lattice (16,000 to 40,000 in an image of 512 x 683) 48 + 8 L.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

struct CrfSettings {
  int64_t iterations = 10;
  double gaussian_sigma = 3, gaussian_weight = 3;         // sigma in pixels, above 0
  double bilateral_sigma = 80, bilateral_sigma_rgb = 13;  // in pixels and in steps of 255, above 0
  double bilateral_weight = 10;
};

namespace cpu {

void dense_crf(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
               const TensorView& shapes, const TensorView& out, const CrfSettings& settings);

}  // namespace cpu

// The same on a CUDA device, within rounding. Offsets, shapes and counts lie on the CPU, everything else on one device.
// The calls return at once: the work is done in the order of `stream`, and the arrays must live until then. As only the
// device knows how many vertices the lattice has, and their memory grows with the labels, there is a call to find them
// and one to infer. The result depends neither on the batch nor on the order in which threads run, to the bit.
// 178 million pixels at most. An update is 14 launches for a batch of up to 64 images, and 6 more for every 64 more.
namespace cuda {

// status int32 [2, B]: the vertices of each image, and 1 where a probability is not finite. workspace int32 [49 P + B]
// and out are what dense_crf goes on from.
void dense_crf_lattice(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& out, const TensorView& status,
                       const TensorView& workspace, const CrfSettings& settings, Stream stream);

// The size of dense_crf's workspace. counts int32 [B]: the vertices of each image. About 9 L + 4 bytes a pixel and
// 12 L + 60 a vertex, which are a tenth of the pixels in an image of 512 x 683.
int64_t dense_crf_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                            int64_t labels, const CrfSettings& settings);

// status and lattice_workspace as given by dense_crf_lattice, counts its first row on the CPU, workspace int32.
void dense_crf(const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& status,
               const TensorView& counts, const TensorView& lattice_workspace, const TensorView& workspace,
               const CrfSettings& settings, Stream stream);

}  // namespace cuda
}  // namespace namedmask
