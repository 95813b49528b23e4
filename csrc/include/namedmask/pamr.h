// SPDX-License-Identifier: MIT
// Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): every pixel's mask becomes, again and again, the mean
// of its neighbors' masks, weighted by how alike their colors are. A packed batch of images of any sizes.
//
// Neighbors  the 8 around a pixel in a 3 x 3 window of each dilation, the pixel itself left out; beyond the border
//             stands the nearest pixel.
// Weights     softmax over all neighbors of the mean over the colors c of -|difference| / (1e-8 + 0.1 s_c), with
//             colors from 0 to 1 and s_c the standard deviation (n - 1) of all windows, the pixel in each of them.
// Arrays      masks float32 [P, L] and image uint8 [P, 3], one image after another in raster order; offsets int32
//             [B + 1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P, L]. All contiguous; out is allocated
//             by the caller and fully written.
// Accuracy    the square roots of the weights are kept with 16 bits, in units of 1/65535 of the pixel's largest, and
//             the weights divided by their own sum; sums in float32. NaN and Inf spread, label by label.
// Empty       an empty batch, images of 0 x n pixels and no labels are fine.
// Errors      std::invalid_argument for a wrong array, for other than 1 to 16 dilations of at least 1, for iterations
//             below 0.
// Aliasing    out must not overlap the inputs.
// Threads     OpenMP, one region, over images. The bits of a label's result depend on neither the threads, nor
//             the other labels, nor the batch. Levels differ by rounding.
// Cost        2 flops per neighbor, label, pixel and iteration; memory per thread 16 bits a neighbor and pixel, and
//             twice the masks of at most 24 labels.
#pragma once

#include <vector>

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void pamr(const TensorView& masks, const TensorView& image, const TensorView& offsets, const TensorView& shapes,
          const TensorView& out, const std::vector<int64_t>& dilations, int64_t iterations);

}  // namespace namedmask::cpu
