// SPDX-License-Identifier: MIT
// Mean-field inference in a fully connected CRF with Gaussian edges (Kraehenbuehl and Koltun, NIPS 2011). A packed
// batch of images of any sizes, any number of labels.
//
// Arrays     probabilities float32 [P, L] and image uint8 [P, 3] (RGB), one image after another in raster order;
//            offsets int32 [B + 1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P, L]. All contiguous; the
//            caller allocates out, which is fully written.
// Model      unary -log(clip(p, 1e-5, 1)); two Potts terms whose kernels are Gaussians of position and of position and
//            color. A kernel K, including its diagonal, is used as N^-1/2 K N^-1/2 with N = diag(K 1). The marginals
//            start as softmax(-unary); an update is softmax(-unary + sum over the terms of weight K marginals).
// Filters    The Gaussian of position on a grid of cubic B-splines, with an error below 0.002 of its peak; the Gaussian
//            of position and color on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010) with axes x,
//            y, r, g, b.
// Empty      an empty batch, images of 0 x n pixels and L = 0 are allowed.
// Errors     std::invalid_argument for probabilities that are not finite, and for sigmas so small that the lattice
//            cannot represent some vertex (an image 3000 sigmas wide); the message names the image.
// Aliasing   out must not overlap the inputs.
// Threads    OpenMP over images. Results are bit-identical for any number of threads and any batch. Instruction levels
//            differ by rounding.
// Cost       about 24 L + 100 operations per update and pixel; 48 bytes of memory per pixel and 48 + 8 L per vertex of
//            the lattice (16,000 to 40,000 in an image of 512 x 683).
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

struct CrfSettings {
  int64_t iterations = 10;
  PerImage gaussian_sigma = {{3}};  // in pixels, above 0
  double gaussian_weight = 3;       // both weights from -1e20 to 1e20
  PerImage bilateral_sigma = {{80}};
  double bilateral_sigma_rgb = 13;  // in 8-bit color levels, above 0
  double bilateral_weight = 10;
};

namespace cpu {

void dense_crf(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
               const TensorView& shapes, const TensorView& out, const CrfSettings& settings);

}  // namespace cpu

// The same on a CUDA device, within rounding. Offsets, shapes and counts are on the CPU, all other arrays on one
// device. The calls only enqueue work on `stream`; the arrays must stay alive until it is done. The number of lattice
// vertices is known only on the device, and their memory grows with the labels, so one call builds the lattice and
// another runs the inference. Results are bit-identical for any batch and any order in which threads run. At most 178
// million pixels. An update takes 13 launches for a batch of up to 64 images, and 6 more for every further 64.
namespace cuda {

// status int32 [2, B]: the number of vertices of each image, and 1 where a probability is not finite. dense_crf takes
// over workspace int32 [37 P] and out.
void dense_crf_lattice(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& out, const TensorView& status,
                       const TensorView& workspace, const CrfSettings& settings, Stream stream);

// The size of dense_crf's workspace. counts int32 [B]: the number of vertices of each image. With C channels, 1 for two
// labels and otherwise L rounded up to a multiple of 4, about 8 C bytes per pixel (16 C for a Gaussian sigma below 3)
// and 16 C + 48 per vertex; a photo of 512 x 683 has 0.05 to 0.15 vertices per pixel, noise up to 6.
int64_t dense_crf_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                            int64_t labels, const CrfSettings& settings);

// lattice_workspace comes from dense_crf_lattice; counts is the first row of status, on the CPU; workspace int32. Both
// workspaces are aligned to 16 bytes, like whole tensors of torch.
void dense_crf(const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& counts,
               const TensorView& lattice_workspace, const TensorView& workspace, const CrfSettings& settings,
               Stream stream);

}  // namespace cuda
}  // namespace namedmask
