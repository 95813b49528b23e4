// SPDX-License-Identifier: MIT
// The parts of bilateral_solver that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "bilateral_grid.h"
#include "level.h"

namespace namedmask::cpu {

struct ColorTable : ColorGrid {
  using ColorGrid::ColorGrid;
  int32_t gray[256];  // the keys of r = g = b, all of which are on a border between chroma cells
};

// The grid as a system of equations. Vertices are in slices of kSlice, sorted by descending number of neighbors, so
// that the vertices of a slice have (nearly) the same number; `count` is a multiple of kSlice. The last slice may be
// padded with vertices without neighbors, of mass 1, any weight and mean 0. Every array has one more slice of zeros.
struct BilateralSystem {
  static constexpr int kSlice = 8;

  int64_t count;
  const int32_t* widths;     // [count / kSlice]: neighbors per vertex of a slice
  const int32_t* neighbors;  // per slice [width, kSlice]; a missing neighbor is `count`
  const float* mass;         // number of pixels in a cell
  const float* weight;       // sum of their confidences, above 0
  float* value;              // in: weighted mean of the target in a cell; out: the solution
  float* scratch[7];
  double smoothness, tolerance;
  int64_t iterations;
};

struct BilateralKernels {
  // keys = the keys of n pixels [n, 3].
  void (*keys)(const uint8_t* rgb, int64_t n, const ColorTable& grid, int32_t* keys);
  void (*solve)(const BilateralSystem& system);
  // out[i] = values[index[i]]
  void (*slice)(const float* values, const int32_t* index, int64_t n, float* out);
};

// grid.key(r, g, b), compiled only once (level.h).
int32_t color_key(const ColorGrid& grid, int r, int g, int b);

NMK_DECLARE_LEVELS(BilateralKernels, bilateral_solver);

}  // namespace namedmask::cpu
