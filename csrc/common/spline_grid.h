// SPDX-License-Identifier: MIT
// The Gaussian of position as a B-spline, a Gaussian on a grid of nodes, and a B-spline, whose variances add up. With a
// spacing of at most two thirds of sigma the error is below 0.002 of the peak. If that is less than a pixel, the nodes
// are the pixels.
#pragma once

#include <math.h>  // sqrt, which std::sqrt is not on a device

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace namedmask {

constexpr int kSplineTaps = 4;  // of a cubic B-spline: a pixel x contributes to the nodes x / step .. x / step + 3

// The distance between nodes in pixels. A row has at least eight pixels at this distance, which the CPU processes at
// once.
inline int64_t grid_step(double sigma, int64_t width) {
  const int64_t widest = std::max<int64_t>(1, width / 8);
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(sigma / 1.5, 1e9)), 1, widest);
}

// The number of nodes along an axis, including the taps of the last pixel.
inline int64_t grid_nodes(int64_t pixels, int64_t step) { return (pixels - 1) / step + kSplineTaps; }

// The standard deviation of the Gaussian on the nodes, in nodes. Below 0.2 the Gaussian has only its center.
inline double grid_deviation(double sigma, int64_t step) {
  const double spline_variance = step == 1 ? 0 : 1.0 / 3;
  if (!(sigma > 0.01)) sigma = 0.01;
  return sqrt(sigma * sigma / static_cast<double>(step * step) - 2 * spline_variance);
}

// Its radius in nodes: the rest is below 2e-5 of the peak, or outside the grid.
inline int64_t grid_radius(double deviation, int64_t most_nodes) {
  return static_cast<int64_t>(std::min(4.65 * deviation, static_cast<double>(most_nodes)));
}

// The weight of pixel x for node x / step + tap; phase = x % step.
NMK_HOST_DEVICE inline double spline_tap(int tap, int64_t phase, int64_t step) {
  if (step == 1) return tap == 1;
  const double f = static_cast<double>(phase) / static_cast<double>(step), g = 1 - f;
  switch (tap) {
    case 0: return g * g * g / 6;
    case 1: return (4 - 3 * f * f * (1 + g)) / 6;
    case 2: return (4 - 3 * g * g * (1 + f)) / 6;
    default: return f * f * f / 6;
  }
}

}  // namespace namedmask
