// SPDX-License-Identifier: MIT
// Connected components of binary masks, 4- or 8-connectivity. A packed batch of masks of any sizes.
//
// Arrays     mask bool [P] (bytes 0 or 1), one image after another in raster order; offsets int32 [B + 1] and shapes
//            int32 [B, 2] as in RaggedShape. All contiguous; the caller allocates outputs, which are fully written.
//            Areas are int32 [N] in pixels and boxes int32 [N, 4] as x, y, width, height, for the N components of all
//            images, ordered by image and label.
// Labels     per image 1, 2, ... in raster order of each component's first pixel; 0 is background.
// Settings   connectivity is 4 (neighbors share a side) or 8 (or a corner). That of fill_holes is the background's.
// Empty      an empty batch, images of 0 x n pixels and masks without foreground are allowed and have no components.
// Aliasing   outputs must not overlap the mask.
// Threads    OpenMP over images; results do not depend on the number of threads or on batch composition.
// Cost       CPU: two passes over the mask, and memory proportional to the number of horizontal runs, which a thread
//            keeps for its next call (64 MB at most). CUDA: five launches per 64 images, three for fill_holes.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "namedmask/tensor_view.h"

namespace namedmask {

struct ComponentStats {
  std::vector<int32_t> areas, boxes;  // [N], [N, 4]
};

inline void expect_connectivity(const char* op, int64_t connectivity) {
  if (connectivity == 4 || connectivity == 8) return;
  throw std::invalid_argument(std::string(op) + ": connectivity must be 4 or 8, but is " +
                              std::to_string(connectivity));
}

namespace cpu {

// labels int32 [P]; first int32 [B + 1]: image b has the components first[b] .. first[b + 1] of the N.
ComponentStats connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                                    const TensorView& labels, const TensorView& first, int64_t connectivity);

// out bool [P]: the component with the most pixels (among equals, the smallest label); all false without components.
void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, int64_t connectivity);

// out bool [P]: the mask plus every background pixel that no connected background path joins to the image border.
void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                int64_t connectivity);

}  // namespace cpu

// The same on a CUDA device. Offsets and shapes are on the CPU, all other arrays on one device. The calls only enqueue
// work on `stream`; the arrays must stay alive until it is done. `workspace` int32 [2 P + 4 B] is scratch. N is known
// only on the device, so labels and areas are separate calls.
namespace cuda {

// labels int32 [P]; counts int32 [B]: the number of components of each image.
void connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                          const TensorView& labels, const TensorView& counts, const TensorView& workspace,
                          int64_t connectivity, Stream stream);

// labels and counts come from connected_components.
void component_stats(const TensorView& labels, const TensorView& offsets, const TensorView& shapes,
                     const TensorView& counts, const TensorView& areas, const TensorView& boxes, Stream stream);

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, const TensorView& workspace, int64_t connectivity, Stream stream);

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                const TensorView& workspace, int64_t connectivity, Stream stream);

// out bool [P]: the component of the pixel seeds[b], counted from the first of image b; none if the seed is -1 or not
// in the mask. seeds int32 [B], on the device.
void seeded_component(const TensorView& mask, const TensorView& seeds, const TensorView& offsets,
                      const TensorView& shapes, const TensorView& out, const TensorView& workspace,
                      int64_t connectivity, Stream stream);

}  // namespace cuda
}  // namespace namedmask
