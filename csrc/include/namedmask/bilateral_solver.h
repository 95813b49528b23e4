// SPDX-License-Identifier: MIT
// The fast bilateral solver (Barron and Poole, ECCV 2016): the smoothest image, in the bilateral space of an image,
// that stays close to a target. A packed batch of images of any sizes, one confidence for every pixel.
//
// Arrays     target float32 [P] and image uint8 [P, 3] (RGB), one image after another in raster order; offsets int32
//            [B + 1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P]. All contiguous; out is allocated by
//            the caller and fully written.
// Grid       a pixel belongs to the cell (x, y, luma, two chromas) / size, truncated; luma and chroma are full-range
//            BT.601, chroma around 128, each plane rounded as fma(b, kb, fma(g, kg, r * kr)) + offset in double.
// Solver     10 bistochastization rounds; conjugate gradients from the cells' means, preconditioned by the diagonal,
//            until the residual is at most `tolerance` times the right-hand side, `iterations` steps at most. float32,
//            sums of products in float64.
// Empty      an empty batch and images of 0 x n pixels are fine.
// Errors     std::invalid_argument for a target that is not finite, naming the image.
// Aliasing   out must not overlap the inputs.
// Threads    OpenMP over images; the result depends neither on the number of threads, nor on the batch, nor on the
//            instruction level, to the bit.
// Cost       per image two passes over the pixels and, per vertex (20,000 in an image of 512 x 683), about 100 bytes a
//            step; memory 4 bytes a pixel and 150 a vertex, which a thread keeps for its next call (64 MB at most). On
//            CUDA eight launches for a batch of up to 64 images, then again for every 64 more; memory 84 bytes a
//            pixel.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

struct BilateralSettings {
  double confidence = 0.999;  // above 0
  double sigma_spatial = 16;  // cell sizes, each at least 1: pixels, and steps of 255
  double sigma_luma = 16;
  double sigma_chroma = 8;
  double smoothness = 256;  // at least 0
  int64_t iterations = 25;
  double tolerance = 1e-5;
};

namespace cpu {

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& offsets,
                      const TensorView& shapes, const TensorView& out, const BilateralSettings& settings);

}  // namespace cpu

// The same on a CUDA device, within rounding. Offsets and shapes stay on the CPU, everything else lies on one device.
// The call returns at once: the work is done in the order of `stream`, and the arrays must live until then. `workspace`
// int32 [21 P + 3 B] is scratch. Since nothing comes back, an image whose target is not finite is not refused: its
// result is NaN. The result depends neither on the batch nor on the order in which threads run, to the bit.
namespace cuda {

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& offsets,
                      const TensorView& shapes, const TensorView& out, const TensorView& workspace,
                      const BilateralSettings& settings, Stream stream);

}  // namespace cuda
}  // namespace namedmask
