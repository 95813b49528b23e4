// SPDX-License-Identifier: MIT
// The parts of dense_crf that exist once per instruction level; see level.h.
//
// An image's pixels are in groups of kGroup. The spatial grid has a node every `step` pixels along both axes; a group
// holds pixels of one row that are `step` apart, so that neighboring lanes read neighboring nodes: lane i of group
// (y, phase, cell / kGroup) is the pixel x = (cell + i) * step + phase. Lanes beyond the image have weight 0.
//
// With more than two labels pixels are processed tile by tile, kTileCells wide and kBandNodes rows of the grid high:
// row by row, the vertices of a whole row would not fit the L1 cache, and neighboring rows read mostly the same ones.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

// The state of one image. With two labels only the difference of their marginals is filtered (channels = 1), since they
// sum to 1; more labels are padded to a multiple of kGroup channels. Arrays [items, channels] are then stored as planes
// [items, kPlane], and one [items, kGroup] if kGroup channels are left: no vector crosses a cache line.
struct CrfSystem {
  static constexpr int kGroup = 8;
  static constexpr int kAxes = 5;             // x, y, red, green, blue
  static constexpr int kCorners = kAxes + 1;  // of a simplex of the permutohedral lattice
  static constexpr int kTaps = 4;             // of a cubic B-spline
  static constexpr int kPlane = 16;      // channels that are next to each other: as many as the widest vectors have
  static constexpr int kRowsAtOnce = 2;  // of an image, if they have the same nodes (channels > 1)
  static constexpr int kBlurRows = 4;    // of the grid, at once (channels > 1)
  static constexpr int kTileCells = 32, kBandNodes = 8;  // of a tile (channels > 1)
  static constexpr int kSums = 2;  // copies of a vertex, to which pixels are added alternately (channels = 1)

  int64_t height, width, labels, channels;

  int64_t step, cells;              // cells per row, a multiple of kGroup
  int64_t tile;                     // cells of a tile
  int64_t grid_height, grid_width;  // in nodes, including the taps of the last pixel
  const float* taps;                // [step, kTaps]: of a pixel by phase
  const float* row_taps;            // [height, kTaps]: times the row's norm and the term's weight
  const float* add_taps;            // [height, kTaps]: times the row's norm
  const float* column_norm;         // [step, cells]
  const float* gauss;               // [-radius to radius]: the filter on the grid, between kBlurRows zeros
  int64_t radius;
  int64_t ring;  // rows of next_grid: all, or (channels > 1) as many as are in use at a time

  int64_t vertices;
  const int32_t* corners;  // [groups, kCorners, kGroup]: a pixel's vertices; bands, tiles, rows, phases, cells in turn
  float* weights;          // same shape: their weights; `normalize` multiplies them by the pixel's norm
  const int32_t* neighbors;  // [kCorners, vertices, 2]: in each direction; a missing neighbor is `vertices`
  float bilateral_weight;

  float *lattice, *next_lattice;  // [vertices + 1, channels], the last row zero; kSums times as wide with one channel
  float *grid, *next_grid;        // [grid_height or ring, grid_width, channels]
  float* rows;                    // scratch: rows of a grid and of pixels
  float* columns;                 // scratch: kBlurRows rows of a grid with `radius` nodes on both sides (channels > 1)
  float* scores;                  // [kGroup, channels] scratch
  float* unary;                   // half log2-odds [height, step, cells] (channels = 1), else log2(p) in out
  float* out;                     // [height * width, labels]
};

// Identifies the simplices of eight pixels: v = round(elevated / 6) packed into 60 bits (low, middle, high), and the
// order in which a walk around the simplex changes the coordinates, 3 bits each.
struct CrfSimplices {
  int32_t low[CrfSystem::kGroup], middle[CrfSystem::kGroup], high[CrfSystem::kGroup], order[CrfSystem::kGroup];
};

struct CrfKernels {
  // features [kAxes, kGroup], scaled -> the simplices of eight pixels and their weights [kCorners, kGroup].
  void (*embed)(const float* features, CrfSimplices* simplices, float* weights);
  // Divides the weights by the square root of the filtered ones.
  void (*normalize)(CrfSystem system);
  // Computes the unary term of probabilities [height * width, labels]. Returns false if one is not finite.
  bool (*start)(CrfSystem system, const float* probabilities);
  // Updates the marginals `iterations` times and writes out.
  void (*infer)(CrfSystem system, int64_t iterations);
};

NMK_DECLARE_LEVELS(CrfKernels, dense_crf);

}  // namespace namedmask::cpu
