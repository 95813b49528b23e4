// SPDX-License-Identifier: MIT
// The parts of pamr that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kPamrColumns = 16;    // columns are padded to a multiple of this: whole vectors at every level
constexpr int64_t kPamrDilations = 16;  // maximum number, for which sums of colors are exact

// The arrays of an image. Float planes are interleaved by row, [height, planes, stride], where a row of a plane has
// `pad` floats, `columns` floats and `pad` floats. Padding repeats the image's first or last column.
struct PamrImage {
  int64_t height, width;
  int64_t columns, pad, stride;  // columns: width rounded up to kPamrColumns
  const int64_t* dilations;
  int64_t n_dilations;
  const float* colors;  // 3 planes, 0 to 255
  // Per row and vector of pixels: a vector of square roots of weights for each neighbor, then one float per pixel, the
  // factor that makes the weights sum to 1. pamr_weights() values per row.
  uint16_t* weights;
};

struct PamrKernels {
  // Computes the weights of row y.
  void (*affinities)(const PamrImage& image, int64_t y);
  // Computes row y of `planes` mask planes, columns [begin, end), whole vectors, from all rows of `source`.
  void (*average)(const PamrImage& image, const float* source, float* target, int64_t planes, int64_t y, int64_t begin,
                  int64_t end);
};

static constexpr int64_t pamr_weights(int64_t columns, int64_t n_dilations) { return columns * (8 * n_dilations + 2); }

// Floats per row of planes: an odd number of cache lines, otherwise the rows around a pixel would share few L1 sets.
static constexpr int64_t pamr_row(int64_t stride, int64_t planes) { return (planes * stride / 16 | 1) * 16; }

NMK_DECLARE_LEVELS(PamrKernels, pamr);

}  // namespace namedmask::cpu
