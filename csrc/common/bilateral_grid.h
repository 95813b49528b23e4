// SPDX-License-Identifier: MIT
// The bilateral grid cell of a pixel, for all backends: the same pixels must be in the same cells.
#pragma once

#include <math.h>  // fma, which std::fma is not on a device

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "host_device.h"
#include "namedmask/bilateral_solver.h"

namespace namedmask {

inline void expect_cells(const BilateralSettings& settings, int64_t images) {
  expect_per_image("bilateral_solver", "sigma_spatial", settings.sigma_spatial, images);
  const std::vector<double>& spatial = settings.sigma_spatial.values;
  const bool wide = std::all_of(spatial.begin(), spatial.end(), [](double sigma) { return sigma >= 1; });
  if (!(wide && settings.sigma_luma >= 1 && settings.sigma_chroma >= 1)) {
    throw std::invalid_argument("bilateral_solver: cell sizes must be at least 1");
  }
  const double ratio = settings.smoothness / settings.confidence;
  if (!(settings.confidence >= 0x1p-40 && settings.smoothness >= 0 && ratio <= 0x1p40)) {
    throw std::invalid_argument("bilateral_solver: confidence, and its ratio to smoothness, must be at least 2^-40");
  }
}

// The least weight of a cell in the solver's equations: cells may have no confidence, but the diagonal must not be 0.
constexpr float kLeastWeight = 1e-30f;

// The key of a color: steps[0] * luma cell + steps[1] * blue cell + steps[2] * red cell + offset. Every axis has a
// spare cell that stays empty, so that a step over an edge does not wrap around; the smallest key minus any step is not
// negative.
struct ColorGrid {
  double sizes[3];  // of the cells of luma, blue chroma, red chroma
  int32_t steps[3];
  int32_t offset;

  explicit ColorGrid(const BilateralSettings& settings)
      : sizes{settings.sigma_luma, settings.sigma_chroma, settings.sigma_chroma} {
    const auto luma_cells = static_cast<int32_t>(255 / settings.sigma_luma) + 2;
    const auto chroma_cells = static_cast<int32_t>(256 / settings.sigma_chroma) + 2;
    steps[0] = 1;
    steps[1] = luma_cells;
    steps[2] = luma_cells * chroma_cells;
    offset = steps[2];
  }

  // The number of possible keys, including those of neighbors.
  size_t keys() const { return static_cast<size_t>(steps[2]) * (static_cast<size_t>(256 / sizes[2]) + 3); }

  // The key of one color, exactly as defined, in double.
  NMK_HOST_DEVICE int32_t key(int r, int g, int b) const {
    constexpr double kPlanes[3][3] = {{0.299, 0.587, 0.114}, {-0.168736, -0.331264, 0.5}, {0.5, -0.418688, -0.081312}};
    const double red = r, green = g, blue = b;
    int32_t key = offset;
    for (int i = 0; i < 3; ++i) {
      const double* k = kPlanes[i];
      const double plane = fma(blue, k[2], fma(green, k[1], red * k[0])) + (i == 0 ? 0.0 : 128.0);
      key += steps[i] * static_cast<int32_t>(plane / sizes[i]);
    }
    return key;
  }
};

// The cell of a pixel along x or y.
NMK_HOST_DEVICE inline int32_t spatial_cell(int32_t pixel, double sigma) { return static_cast<int32_t>(pixel / sigma); }

// The first pixel of a cell along x or y; a cell is at least one pixel wide, so none is empty.
NMK_HOST_DEVICE inline int32_t first_pixel(int32_t cell, double sigma) {
  const double start = cell * sigma;
  if (!(start < INT32_MAX - 1)) return INT32_MAX;
  auto pixel = static_cast<int32_t>(start);
  if (pixel > 0) --pixel;  // both the product and the quotient in spatial_cell are rounded
  while (spatial_cell(pixel, sigma) < cell) ++pixel;
  return pixel;
}

}  // namespace namedmask
