// SPDX-License-Identifier: MIT
// Resizes images with an antialiasing filter. A packed batch of images of any sizes, each to a size of its own.
//
// Arrays     image uint8 or float32 [P, C], one image after another in raster order; offsets int32 [B + 1] and shapes
//            int32 [B, 2] as in RaggedShape; sizes int32 [B, 2], the new heights and widths. out [Q, C], with
//            new_offsets and new_shapes alike, of the image's dtype. All contiguous; the caller allocates outputs,
//            which are fully written.
// Filter     separable, and wider by the factor of a reduction: a triangle (kBilinear) or Keys' cubic with a = -0.5
//            (kBicubic). Weights are those of torch's antialias=True and of Pillow: pixel centers are at half integers,
//            taps beyond the image are left out, and the others are scaled to sum to 1. Rows are resized first, then
//            columns; of uint8 images both results are rounded to nearest and clamped. An axis that keeps its length
//            keeps its values. float32, and uint8 on CUDA, are computed in float32; uint8 on the CPU in integers, with
//            weights of at least 14 bits that sum to exactly 1.
// Levels     with levels float32, bfloat16 or float16 [C, 256], out has their dtype and is levels[c, x] for the resized
//            uint8 value x of channel c, such as (x / 255 - mean) / std. Without, levels is [0, 256].
// Patches    with levels, rows of out may be patches of p x p pixels, [T, C * p * p] in the order (c, y, x), on a grid
//            new_shapes = ceil(sizes / p). Beyond the image they are 0. Without patches p = 1.
// Empty      an image without pixels requires a size without pixels, and only such an image has one.
// Aliasing   out must not overlap the image.
// Threads    OpenMP over images; results do not depend on the number of threads or on batch composition.
// Cost       CPU: 2 H W' C k + 2 H' W' C l flops for k taps per row and l per column; memory for H W' C values. CUDA:
//            one launch per 64 images.
#pragma once

#include "namedmask/tensor_view.h"

namespace namedmask {

enum class Interpolation : int64_t { kBilinear, kBicubic };

namespace cpu {

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, Interpolation interpolation, int64_t patch);

}  // namespace cpu

// The same on a CUDA device. Offsets, shapes and sizes are on the CPU, the other arrays on one device. The call only
// enqueues work on `stream`; the arrays must stay alive until it is done.
namespace cuda {

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, Interpolation interpolation, int64_t patch, Stream stream);

}  // namespace cuda
}  // namespace namedmask
