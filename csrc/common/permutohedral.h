// SPDX-License-Identifier: MIT
// The permutohedral lattice over x, y, r, g, b (Adams, Baek and Davis, Eurographics 2010): keys of
// vertices and steps between them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "host_device.h"
#include "namedmask/dense_crf.h"

namespace namedmask {

constexpr int kLatticeAxes = 5;
constexpr int kLatticeCorners = kLatticeAxes + 1;  // of a simplex, and directions of the lattice

// A vertex has coordinates 6 m_i + r, with the same r for all, that sum to 0; five of the m, 12 bits each, and r
// identify it. A step increases all coordinates by 1 (r + 1) and decreases one of them by 6.
typedef uint64_t LatticeKey;

// Added to m_0 .. m_4, so that they are from 0 to 4095.
constexpr int32_t kLatticeBias = 1 << 11;

NMK_HOST_DEVICE inline LatticeKey lattice_unit(int axis) {
  return axis < kLatticeAxes ? LatticeKey{1} << (12 * axis + 3) : 0;
}

// One step in a direction of the lattice; all six in any order lead back to the start.
NMK_HOST_DEVICE inline LatticeKey lattice_step(LatticeKey key, int direction) {
  constexpr LatticeKey kAllUnits = (LatticeKey{1} << 3) + (LatticeKey{1} << 15) + (LatticeKey{1} << 27) +
                                   (LatticeKey{1} << 39) + (LatticeKey{1} << 51);
  const LatticeKey ahead = (key & 7) < kLatticeAxes ? key + 1 : key - kLatticeAxes + kAllUnits;
  return ahead - lattice_unit(direction);
}

// The scale of features along an axis: with unit steps the lattice blurs with a standard deviation of (d + 1) sqrt(2 /
// 3).
inline float lattice_scale(int axis, double sigma, double sigma_rgb) {
  const double length = kLatticeCorners * std::sqrt(2.0 / 3 / ((axis + 1) * (axis + 2)));
  return static_cast<float>(length / (axis < 2 ? sigma : sigma_rgb));
}

// Throws std::invalid_argument unless weights are in range, the sigmas are above 0 and all lattice coordinates, divided
// by 6, fit 12 bits.
inline void expect_sigmas(const RaggedShape& batch, const CrfSettings& s) {
  const std::string op = "dense_crf";
  bool positive = s.bilateral_sigma_rgb > 0;
  for (const PerImage* sigmas : {&s.gaussian_sigma, &s.bilateral_sigma}) {
    expect_per_image("dense_crf", "sigma_xy", *sigmas, batch.count);
    for (double sigma : sigmas->values) positive = positive && sigma > 0;
  }
  if (!positive) {
    throw std::invalid_argument(op + ": sigmas must be above 0");
  }
  if (!(std::abs(s.gaussian_weight) <= 1e20 && std::abs(s.bilateral_weight) <= 1e20)) {
    throw std::invalid_argument(op + ": weights must be from -1e20 to 1e20");
  }
  for (int64_t b = 0; b < batch.count; ++b) {
    const double width = static_cast<double>(batch.width(b)), height = static_cast<double>(batch.height(b));
    const double features[kLatticeAxes] = {width, height, 255, 255, 255};
    double sum = 0, most = 0;
    for (int i = 0; i < kLatticeAxes; ++i) {
      const double extent = features[i] / (i < 2 ? s.bilateral_sigma[b] : s.bilateral_sigma_rgb) *
                            std::sqrt(2.0 / 3 / ((i + 1) * (i + 2)));
      sum += extent;
      most = std::max(most, (i + 1) * extent);
    }
    if (!(std::max(sum, most) < 2000)) {
      throw std::invalid_argument(op + ": the sigmas of bilateral are too small for image " + std::to_string(b) +
                                  " of " + std::to_string(batch.height(b)) + " x " + std::to_string(batch.width(b)));
    }
  }
}

}  // namespace namedmask
