// SPDX-License-Identifier: MIT
// Connected components of binary masks, 4-connectivity, a packed batch of masks of any sizes.
//
// Arrays     mask bool [P] (bytes 0 or 1), one image after another in raster order; offsets int32 [B + 1] and shapes
//            int32 [B, 2] as in RaggedShape. All contiguous; outputs are allocated by the caller and fully written.
//            Areas are int32 [N] pixels and boxes int32 [N, 4] as x, y, width, height, for the N components of all
//            images, image after image, label after label.
// Labels     per image 1, 2, ... in raster order of each component's first pixel; 0 is background.
// Empty      an empty batch, images of 0 x n pixels and all-background masks are fine: nothing is labeled.
// Aliasing   outputs must not overlap the mask.
// Threads    OpenMP over images; the result does not depend on the number of threads nor on the batch.
// Cost       on the CPU two passes over the mask, memory proportional to the number of horizontal runs, which a thread
//            keeps for its next call (64 MB at most); on CUDA five launches for a batch of up to 64 images (three to
//            fill holes, then again for every 64 more).
#pragma once

#include <vector>

#include "namedmask/tensor_view.h"

namespace namedmask {

struct ComponentStats {
  std::vector<int32_t> areas, boxes;  // [N], [N, 4]
};

namespace cpu {

// labels int32 [P]; first int32 [B + 1]: image b's components are first[b] .. first[b + 1] of the N.
ComponentStats connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                                    const TensorView& labels, const TensorView& first);

// out bool [P]: the component with most pixels (of equals, the one with the smallest label); all false if none.
void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out);

// out bool [P]: the mask, and every background pixel that no 4-connected background path joins to the image's border.
void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out);

}  // namespace cpu

// The same on a CUDA device. Offsets and shapes stay on the CPU, everything else lies on one device. The calls return
// at once: the work is done in the order of `stream`, and the arrays must live until then. `workspace` int32
// [2 P + 4 B] is scratch. Since only the device knows N, labels and areas take a call each.
namespace cuda {

// labels int32 [P]; counts int32 [B]: components of each image.
void connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                          const TensorView& labels, const TensorView& counts, const TensorView& workspace,
                          Stream stream);

// labels and counts as given by connected_components.
void component_stats(const TensorView& labels, const TensorView& offsets, const TensorView& shapes,
                     const TensorView& counts, const TensorView& areas, const TensorView& boxes, Stream stream);

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, const TensorView& workspace, Stream stream);

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                const TensorView& workspace, Stream stream);

}  // namespace cuda
}  // namespace namedmask
