// SPDX-License-Identifier: MIT
// The fast bilateral solver (Barron and Poole, ECCV 2016): the image that is smoothest in the bilateral space of a
// reference image while it stays close to a target. A packed batch of images of any sizes.
//
// Arrays     target float32 [P] and image uint8 [P, 3] (RGB), one image after another in raster order; offsets int32 [B
//            + 1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P]. All contiguous; the caller allocates out,
//            which is fully written. confidence float32 [P], one per pixel from 0 to 1 (not checked), or [0]: then all
//            have that of the settings.
// Grid       a pixel belongs to the cell (x, y, luma, two chromas) / size, truncated; luma and chroma are full-range
//            BT.601, chroma around 128, each plane rounded as fma(b, kb, fma(g, kg, r * kr)) + offset in double.
// Solver     10 rounds of bistochastization; conjugate gradients from the cells' means with a diagonal preconditioner,
//            until the residual is at most `tolerance` times the right-hand side or for `iterations` iterations.
//            float32, with dot products in float64. The means are weighted by the confidences; a cell without any
//            starts at the image's mean, and an image without any is 0.
// Empty      an empty batch and images of 0 x n pixels are allowed.
// Errors     std::invalid_argument for a target that is not finite; the message names the image.
// Aliasing   out must not overlap the inputs.
// Threads    OpenMP over images. Results are bit-identical for any number of threads, batch and instruction level.
// Cost       per image two passes over the pixels, and about 100 bytes per vertex and iteration (an image of 512 x 683
//            has 20,000 vertices). Memory: 4 bytes per pixel and 150 per vertex, which a thread keeps for its next call
//            (64 MB at most). On CUDA eight launches per 64 images and 92 bytes per pixel.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

struct BilateralSettings {
  double confidence = 0.999;        // at least 2^-40
  PerImage sigma_spatial = {{16}};  // cell sizes, each at least 1: in pixels and in 8-bit levels
  double sigma_luma = 16;
  double sigma_chroma = 8;
  double smoothness = 256;  // at least 0, at most 2^40 times the confidence
  int64_t iterations = 25;
  double tolerance = 1e-5;
};

namespace cpu {

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& confidence,
                      const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                      const BilateralSettings& settings);

}  // namespace cpu

// The same on a CUDA device, within rounding. Offsets and shapes are on the CPU, all other arrays on one device. The
// call only enqueues work on `stream`; the arrays must stay alive until it is done. `workspace` int32 [23 P + 3 B + 768
// min(B, 64)] is scratch. A target that is not finite and a confidence that is not from 0 to 1 raise no error: the
// result of the image is NaN. Results are bit-identical for any batch and any order in which threads run, in clusters
// of blocks and without.
namespace cuda {

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& confidence,
                      const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                      const TensorView& workspace, const BilateralSettings& settings, Stream stream);

}  // namespace cuda
}  // namespace namedmask
