// SPDX-License-Identifier: MIT
// The taps of a pixel of a resized row or column, shared by the CPU and CUDA versions of resize.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "namedmask/resize.h"
#include "namedmask/tensor_view.h"

namespace namedmask {

struct Taps {
  int32_t first, count;  // of the input
  double center, scale;  // of the filter, and how much wider than the interpolation it is, at least 1
};

NMK_HOST_DEVICE inline double half_width(Interpolation interpolation) {
  return interpolation == Interpolation::kBilinear ? 1 : 2;
}

// The taps of pixel i of `to`, in an image with `from` pixels along this axis.
NMK_HOST_DEVICE inline Taps taps_of(int64_t i, int64_t from, int64_t to, Interpolation interpolation) {
  const double step = static_cast<double>(from) / static_cast<double>(to), scale = step > 1 ? step : 1;
  const double center = step * (static_cast<double>(i) + 0.5), reach = half_width(interpolation) * scale;
  const auto first = static_cast<int64_t>(center - reach + 0.5), end = static_cast<int64_t>(center + reach + 0.5);
  const int64_t begin = center - reach + 0.5 < 0 ? 0 : first;
  return {static_cast<int32_t>(begin), static_cast<int32_t>((end < from ? end : from) - begin), center, scale};
}

// The weight of tap k, before the weights are scaled to sum to 1.
NMK_HOST_DEVICE inline double weight_of(const Taps& taps, int32_t k, Interpolation interpolation) {
  double x = (static_cast<double>(taps.first + k) + 0.5 - taps.center) / taps.scale;
  x = x < 0 ? -x : x;
  if (interpolation == Interpolation::kBilinear) return x < 1 ? 1 - x : 0;
  constexpr double kA = -0.5;
  if (x < 1) return ((kA + 2) * x - (kA + 3)) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * kA - 4 * kA : 0;
}

// Checks the sizes of resize. Throws std::invalid_argument.
inline void expect_sizes(const RaggedShape& from, const RaggedShape& to) {
  if (from.count != to.count) throw std::invalid_argument("resize: there must be one size per image");
  for (int64_t b = 0; b < from.count; ++b) {
    if ((from.begin(b) == from.end(b)) != (to.begin(b) == to.end(b))) {
      throw std::invalid_argument("resize: image " + std::to_string(b) +
                                  " and its new size must both have pixels, or neither");
    }
  }
}

}  // namespace namedmask
