// SPDX-License-Identifier: MIT
// dense_crf's Gaussian of position on the device, by the method of csrc/common/spline_grid.h: pixels are added to the
// nodes along rows and then along columns, the nodes are blurred along both, and interpolated along columns and then
// along rows. The arrays between rows and columns are called "halves": rows of pixels by nodes of a row.
//
// Every kernel uses one thread per output and vector of channels, which gathers its inputs in a fixed order. All should
// be bound by memory: at sigma 3 (step 2) they read and write about 5 floats per pixel and channel, apart from cached
// accesses.
#pragma once

#include <vector>

#include "channels.h"
#include "images.h"
#include "spline_grid.h"

namespace namedmask::cuda {
namespace {

// The items that images.chunks of GridImages counts, unless it counts tiles.
enum class Items { kHalves, kNodes, kTables };

// The images of a launch with their grids. Nodes, halves and tables are the totals of the images before each, including
// images of other launches.
struct GridImages : Images {
  int32_t step[kMaxImages] = {}, radius[kMaxImages] = {};
  int32_t tables[kMaxImages] = {};
  double deviation[kMaxImages] = {};  // of the Gaussian on the nodes
  int64_t nodes[kMaxImages] = {}, halves[kMaxImages] = {};
};

__device__ inline int32_t nodes_along(int32_t pixels, int32_t step) { return (pixels - 1) / step + kSplineTaps; }

// An image with its grid and its parts of the arrays.
struct GridImage : Image {
  __device__ GridImage(const GridImages& images, int place, float* tables)
      : Image(image_at(images, images.chunks, place)),
        step(images.step[place]),
        radius(images.radius[place]),
        rows(nodes_along(height, step)),
        columns(nodes_along(width, step)),
        deviation(images.deviation[place]),
        node_begin(images.nodes[place]),
        half_begin(images.halves[place]),
        row_norm(tables + images.tables[place]),
        column_norm(row_norm + height),
        gauss(column_norm + width),
        taps(gauss + radius + 1) {}

  int32_t step, radius, rows, columns;  // numbers of rows and columns of nodes
  double deviation;
  int64_t node_begin, half_begin;
  // Its tables: the norm of each row and column of pixels, the Gaussian from its center outward, and the taps
  // [step, kSplineTaps] of a pixel by phase.
  float *row_norm, *column_norm, *gauss, *taps;
};

__device__ GridImage my_grid(const GridImages& images, float* tables) {
  return GridImage(images, my_place(images, images.chunks), tables);
}

// The output of a thread, in the image's array [lines, columns, vectors]; spare threads have a line beyond the last.
// 32 bits are enough (dense_crf checks the size), and their division is several times faster than that of 64.
struct Output {
  int32_t line, column, vector;
};

__device__ Output my_output(const GridImage& grid, int32_t vectors) {
  const auto item = static_cast<unsigned>(grid.chunk_item()), across = static_cast<unsigned>(grid.columns * vectors);
  const unsigned line = item / across, rest = item - line * across, column = rest / static_cast<unsigned>(vectors);
  return {static_cast<int32_t>(line), static_cast<int32_t>(column),
          static_cast<int32_t>(rest - column * static_cast<unsigned>(vectors))};
}

// Its index in an array with `begin` elements per vector before the image.
__device__ int64_t place_of(const Output& to, const GridImage& grid, int64_t begin, int32_t vectors) {
  return (begin + to.line * grid.columns + to.column) * vectors + to.vector;
}

// -- tables --

__device__ double gauss_at(int64_t distance, double deviation) {
  const double d = static_cast<double>(distance) / deviation;
  return exp(-0.5 * d * d);
}

// The sum that `pixels` ones along an axis add to a node.
__device__ double ones_at(int64_t node, int64_t pixels, int64_t step) {
  if (node >= kSplineTaps - 1 && (node + 1) * step <= pixels) return static_cast<double>(step);  // taps sum to 1
  double sum = 0;
  for (int tap = 0; tap < kSplineTaps; ++tap) {
    const int64_t first = (node - tap) * step;
    for (int64_t phase = 0; phase < step; ++phase) {
      if (first + phase >= 0 && first + phase < pixels) sum += spline_tap(tap, phase, step);
    }
  }
  return sum;
}

// 1 / sqrt of the kernel's row sum at a pixel of an axis: ones, splatted, blurred and sliced.
__device__ double norm_at(int64_t pixel, int64_t pixels, int64_t nodes, int64_t step, int64_t radius,
                          double deviation) {
  double sum = 0;
  for (int tap = 0; tap < kSplineTaps; ++tap) {
    const int64_t center = pixel / step + tap, last = min(nodes - 1, center + radius);
    double blurred = 0;
    for (int64_t node = max(int64_t{0}, center - radius); node <= last; ++node) {
      blurred += gauss_at(node - center, deviation) * ones_at(node, pixels, step);
    }
    sum += spline_tap(tap, pixel % step, step) * blurred;
  }
  return 1 / sqrt(sum);
}

int64_t table_size(int64_t h, int64_t w, int64_t step, int64_t radius) {
  return h + w + radius + 1 + step * kSplineTaps;
}

__global__ void __launch_bounds__(kChunk, 1) fill_tables(const __grid_constant__ GridImages images, float* tables) {
  const GridImage grid = my_grid(images, tables);
  const double deviation = grid.deviation;
  const int64_t i = grid.chunk_item();
  double value;
  if (i < grid.height) {
    value = norm_at(i, grid.height, grid.rows, grid.step, grid.radius, deviation);
  } else if (i < grid.height + grid.width) {
    value = norm_at(i - grid.height, grid.width, grid.columns, grid.step, grid.radius, deviation);
  } else if (i < grid.taps - grid.row_norm) {
    value = gauss_at(i - grid.height - grid.width, deviation);
  } else {
    const int64_t tap = i - (grid.taps - grid.row_norm);
    if (tap >= int64_t{grid.step} * kSplineTaps) return;
    value = spline_tap(static_cast<int>(tap % kSplineTaps), tap / kSplineTaps, grid.step);
  }
  grid.row_norm[i] = static_cast<float>(value);
}

// -- filter --

// Calls f(pixel, weight of its tap) for the pixels that contribute to a node along an axis, in order.
template <class F>
__device__ void for_each_pixel_of(int32_t node, int32_t pixels, const GridImage& grid, F f) {
  for (int tap = kSplineTaps - 1; tap >= 0; --tap) {
    const int32_t first = (node - tap) * grid.step;
    if (first < 0) continue;
    for (int32_t phase = 0; phase < grid.step && first + phase < pixels; ++phase) {
      f(first + phase, grid.taps[phase * kSplineTaps + tap]);
    }
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kChunk)
    add_rows(const __grid_constant__ GridImages images, float* tables, int32_t vectors, const Channels<kWidth>* pixels,
             Channels<kWidth>* halves) {
  const GridImage grid = my_grid(images, tables);
  const Output to = my_output(grid, vectors);
  if (to.line >= grid.height) return;
  const auto* const row = pixels + (grid.begin + int64_t{to.line} * grid.width) * vectors + to.vector;
  Channels<kWidth> sum = {};
  for_each_pixel_of(to.column, grid.width, grid,
                    [&](int32_t x, float tap) { sum.add(tap * grid.column_norm[x], row[x * vectors]); });
  halves[place_of(to, grid, grid.half_begin, vectors)] = sum;
}

template <int kWidth>
__global__ void __launch_bounds__(kChunk)
    add_columns(const __grid_constant__ GridImages images, float* tables, int32_t vectors,
                const Channels<kWidth>* halves, Channels<kWidth>* nodes) {
  const GridImage grid = my_grid(images, tables);
  const Output to = my_output(grid, vectors);
  if (to.line >= grid.rows) return;
  const auto* const column = halves + (grid.half_begin + to.column) * vectors + to.vector;
  const int32_t stride = grid.columns * vectors;
  Channels<kWidth> sum = {};
  for_each_pixel_of(to.line, grid.height, grid,
                    [&](int32_t y, float tap) { sum.add(tap * grid.row_norm[y], column[y * stride]); });
  nodes[place_of(to, grid, grid.node_begin, vectors)] = sum;
}

template <int kWidth>
__global__ void __launch_bounds__(kChunk)
    blur_nodes(const __grid_constant__ GridImages images, float* tables, int32_t vectors, bool along_rows,
               const Channels<kWidth>* from, Channels<kWidth>* to_nodes) {
  const GridImage grid = my_grid(images, tables);
  const Output to = my_output(grid, vectors);
  if (to.line >= grid.rows) return;
  const int64_t at = place_of(to, grid, grid.node_begin, vectors);
  const int32_t stride = along_rows ? vectors : grid.columns * vectors;
  const int32_t place = along_rows ? to.column : to.line;
  const int32_t before = min(place, grid.radius);
  const int32_t after = min((along_rows ? grid.columns : grid.rows) - 1 - place, grid.radius);
  Channels<kWidth> sum = {};
#pragma unroll 4
  for (int32_t t = -before; t <= after; ++t) sum.add(grid.gauss[t < 0 ? -t : t], from[at + t * stride]);
  to_nodes[at] = sum;
}

template <int kWidth>
__global__ void __launch_bounds__(kChunk)
    read_columns(const __grid_constant__ GridImages images, float* tables, int32_t vectors, float weight,
                 const Channels<kWidth>* nodes, Channels<kWidth>* halves) {
  const GridImage grid = my_grid(images, tables);
  const Output to = my_output(grid, vectors);
  if (to.line >= grid.height) return;
  const int32_t y = to.line, stride = grid.columns * vectors;
  const auto first = static_cast<int32_t>(static_cast<unsigned>(y) / static_cast<unsigned>(grid.step));
  const float* const taps = grid.taps + (y - first * grid.step) * kSplineTaps;
  const auto* const column = nodes + (grid.node_begin + first * grid.columns + to.column) * vectors + to.vector;
  Channels<kWidth> sum = {};
#pragma unroll
  for (int tap = 0; tap < kSplineTaps; ++tap) {
    sum.add(taps[tap], column[tap * stride]);
  }
  sum.scale(weight * grid.row_norm[y]);
  halves[place_of(to, grid, grid.half_begin, vectors)] = sum;
}

// How a column of pixels reads a row of halves, for read_row.
struct ColumnTaps {
  __device__ ColumnTaps(const GridImage& grid, int32_t x) {
    const auto node = static_cast<int32_t>(static_cast<unsigned>(x) / static_cast<unsigned>(grid.step));
    const float* const of_phase = grid.taps + (x - node * grid.step) * kSplineTaps;
    first = node;
    for (int tap = 0; tap < kSplineTaps; ++tap) taps.of[tap] = grid.column_norm[x] * of_phase[tap];
  }
  ColumnTaps() = default;

  Channels<kSplineTaps> taps;
  int32_t first;
};

template <int kWidth>
__device__ Channels<kWidth> read_row(const GridImage& grid, int32_t vectors, const Channels<kWidth>* halves,
                                     const ColumnTaps& x, int32_t y, int32_t vector) {
  const auto* const row = halves + (grid.half_begin + y * grid.columns + x.first) * vectors + vector;
  const Channels<kSplineTaps> taps = x.taps;
  Channels<kWidth> sum = {};
#pragma unroll
  for (int tap = 0; tap < kSplineTaps; ++tap) sum.add(taps.of[tap], row[tap * vectors]);
  return sum;
}

// -- on the host --

// All images of a batch, and the sizes of their arrays.
struct Grids {
  std::vector<GridImages> groups;
  int64_t nodes = 0, halves = 0, tables = 0;
  int64_t most = 0;  // maximum nodes or halves of an image
};

Grids lay_grids(const RaggedShape& batch, const PerImage& sigma) {
  Grids grids;
  for_each_group(batch, [&](const Images& group, int64_t) {
    GridImages images = {group};
    for (int32_t i = 0; i < images.count; ++i) {
      const int64_t h = images.height[i], w = images.width[i];
      images.nodes[i] = grids.nodes;
      images.halves[i] = grids.halves;
      images.tables[i] = static_cast<int32_t>(grids.tables);
      images.step[i] = 1;
      if (h * w == 0) continue;
      const int64_t step = grid_step(sigma[images.first + i], w), rows = grid_nodes(h, step),
                    columns = grid_nodes(w, step);
      images.deviation[i] = grid_deviation(sigma[images.first + i], step);
      const int64_t radius = grid_radius(images.deviation[i], std::max(rows, columns));
      images.step[i] = static_cast<int32_t>(step);
      images.radius[i] = static_cast<int32_t>(radius);
      grids.most = std::max({grids.most, rows * columns, h * columns});
      grids.nodes += rows * columns;
      grids.halves += h * columns;
      grids.tables += table_size(h, w, step, radius);
    }
    grids.groups.push_back(images);
  });
  return grids;
}

// The same images with chunks of other items, times `vectors`.
GridImages with_chunks(GridImages images, Items items, int64_t vectors) {
  for (int32_t i = 0; i < images.count; ++i) {
    const int64_t h = images.height[i], w = images.width[i], step = images.step[i];
    int64_t count = 0;
    if (h * w > 0) {
      switch (items) {
        case Items::kHalves: count = h * grid_nodes(w, step) * vectors; break;
        case Items::kNodes: count = grid_nodes(h, step) * grid_nodes(w, step) * vectors; break;
        case Items::kTables: count = table_size(h, w, step, images.radius[i]); break;
      }
    }
    images.chunks[i + 1] = images.chunks[i] + static_cast<int32_t>((count + kChunk - 1) / kChunk);
  }
  return images;
}

int64_t blocks_of(const Images& images) { return images.chunks[images.count]; }

}  // namespace
}  // namespace namedmask::cuda
