// SPDX-License-Identifier: MIT
// The parts of pamr that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kPamrColumns = 16;    // rows are made of whole vectors of every level
constexpr int64_t kPamrDilations = 16;  // at most: the sums of colors stay exact

// An image's arrays, with float planes row by row: [height, planes, stride], where a row of a plane is `pad` floats,
// then `columns`, then `pad`. What lies outside the image's own columns repeats its first or its last one.
struct PamrImage {
  int64_t height, width;
  int64_t columns, pad, stride;  // columns: width rounded up to whole vectors
  const int64_t* dilations;
  int64_t n_dilations;
  const float* colors;  // 3 planes, 0 to 255
  // Per row and vector of pixels: a vector of roots of weights for each neighbor, then one float per pixel that makes
  // the weights sum to 1. pamr_weights() of them per row.
  uint16_t* weights;
};

struct PamrKernels {
  // The weights of row y.
  void (*affinities)(const PamrImage& image, int64_t y);
  // Row y of `planes` mask planes, columns [begin, end), whole vectors, from all rows of `source`.
  void (*average)(const PamrImage& image, const float* source, float* target, int64_t planes, int64_t y, int64_t begin,
                  int64_t end);
};

static constexpr int64_t pamr_weights(int64_t columns, int64_t n_dilations) { return columns * (8 * n_dilations + 2); }

// Floats of a row of planes: an odd number of cache lines, or the rows around a pixel would share few of L1's sets.
static constexpr int64_t pamr_row(int64_t stride, int64_t planes) { return (planes * stride / 16 | 1) * 16; }

NMK_DECLARE_LEVELS(PamrKernels, pamr);

}  // namespace namedmask::cpu
