// SPDX-License-Identifier: MIT
// COCO's run-length encoding of binary masks. A packed batch of masks of any sizes.
//
// Arrays     mask bool [P] (bytes 0 or 1), one image after another in raster order; offsets int32 [B + 1] and shapes
//            int32 [B, 2] as in RaggedShape. All contiguous; the caller allocates outputs, which are fully written.
// Runs       of an image: its pixels in column-major order, alternately false and true, the first run false. Only the
//            first run may be empty, and that of an image without pixels. Lengths are int32 [N], image after image.
// String     of an image: COCO's compressed form, in which a length from the fourth on is the difference to the one
//            two before it, in groups of five bits, as ASCII.
// Empty      an empty batch and images of 0 x n pixels are allowed; such an image has one run of length 0.
// Threads    OpenMP over images; results do not depend on the number of threads or on batch composition.
// Cost       CPU: one pass over the mask, and work and memory proportional to the number of runs.
//            CUDA: two passes over the mask; three launches per 64 images.
#pragma once

#include <vector>

#include "namedmask/tensor_view.h"

namespace namedmask {
namespace cpu {

// first int32 [B + 1]: image b has the runs first[b] .. first[b + 1] of the N. Returns the lengths.
std::vector<int32_t> run_lengths(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                                 const TensorView& first);

// lengths int32 [N] and first int32 [B + 1] from run_lengths. areas int32 [B], in pixels; boxes int32 [B, 4] as x, y,
// width, height, zeros without a true pixel; ends int32 [B + 1]: image b has the characters ends[b] .. ends[b + 1].
// Returns the strings. They must not exceed 2^31 - 1 characters in all.
std::vector<uint8_t> compress_runs(const TensorView& lengths, const TensorView& first, const TensorView& shapes,
                                   const TensorView& areas, const TensorView& boxes, const TensorView& ends);

}  // namespace cpu

// The same on a CUDA device. Offsets and shapes are on the CPU, all other arrays on one device. The calls only enqueue
// work on `stream`; the arrays must stay alive until it is done. N is known only on the device, so numbers and lengths
// are separate calls.
namespace cuda {

// counts int32 [B]: the number of pixels of each image that begin a run, one less than its runs. columns int32 [C], for
// the C columns of all images: the number of those in the columns of the same image before this one.
void run_counts(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& columns,
                const TensorView& counts, Stream stream);

// columns from run_counts; first int32 [B + 1]: the runs before each image; begins int32 [N] is scratch.
void run_lengths(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& columns,
                 const TensorView& first, const TensorView& begins, const TensorView& lengths, Stream stream);

}  // namespace cuda
}  // namespace namedmask
