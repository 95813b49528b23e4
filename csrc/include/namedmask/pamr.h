// SPDX-License-Identifier: MIT
// Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): in every iteration, the mask at a pixel becomes the
// mean of its neighbors' masks, weighted by color similarity. A packed batch of images of any sizes.
//
// Neighbors   the 8 pixels around a pixel in a 3 x 3 window of each dilation, without the pixel itself; positions
//             beyond the border are clamped to the nearest pixel.
// Weights     softmax over all neighbors of the mean over the colors c of -|difference| / (1e-8 + 0.1 s_c), with colors
//             from 0 to 1 and s_c the standard deviation (n - 1) over all windows, each including the pixel itself.
// Arrays      masks float32 [P, L] and image uint8 [P, 3], one image after another in raster order; offsets int32 [B +
//             1] and shapes int32 [B, 2] as in RaggedShape; out float32 [P, L]. All contiguous; the caller allocates
//             out, which is fully written.
// Accuracy    the square roots of the weights are stored in 16 bits, in units of 1/65535 of the pixel's largest, and
//             the weights are divided by their own sum; sums in float32. NaN and Inf propagate within their label;
//             finite masks stay finite.
// Empty       an empty batch, images of 0 x n pixels and L = 0 are allowed.
// Dilations   one list of counts[0] numbers for all images, or one after another a list of counts[b] for each.
// Errors      std::invalid_argument for a wrong array, for other than 1 to 16 dilations of at least 1 per list, for
//             another number of lists, and for iterations below 0.
// Aliasing    out must not overlap the inputs.
// Threads     OpenMP, one region, over images. A label's result is bit-identical for any number of threads, other
//             labels and batch. Levels differ by rounding.
// Cost        2 flops per neighbor, label, pixel and iteration. Memory per thread: 16 bits per neighbor and pixel, and
//             two copies of the masks of at most 24 labels.
#pragma once

#include <vector>

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void pamr(const TensorView& masks, const TensorView& image, const TensorView& offsets, const TensorView& shapes,
          const TensorView& out, const std::vector<int64_t>& dilations, const std::vector<int64_t>& counts,
          int64_t iterations);

}  // namespace namedmask::cpu
