// SPDX-License-Identifier: MIT
#include "normalized_rows.h"

#include <algorithm>
#include <cmath>

#include "level.h"
#include "normalized_rows_levels.h"

namespace namedmask::cpu {
namespace {

constexpr int64_t kPart = 64;  // channels per transposed part of a panel

const NormalizedRowsKernels& kernels() { return NMK_BEST(normalized_rows); }

}  // namespace

double dot(const double* a, const double* b, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

NormalizedRows::NormalizedRows() : kernels_(kernels()) {}

void NormalizedRows::prepare(const float* features, int64_t n, int64_t channels, bool rows, bool panels) {
  features_ = features, n_ = n, channels_ = channels, padded_ = round_up(n, kBlock);
  rows_ = rows ? row_memory_.reserve(padded_ * channels_) : nullptr;
  panels_ = panels ? panel_memory_.reserve(padded_ * channels_) : nullptr;
  factors_.reserve(padded_);
  finite_ = true;
}

void NormalizedRows::unit_row(int64_t i, float* out) const {
  kernels_.scale(features_ + std::min(i, n_ - 1) * channels_, channels_, factors_[i], out);
}

void NormalizedRows::normalize(int64_t panel) {
  const int64_t first = panel * kPanel;
  for (int64_t i = first; i < first + kPanel; ++i) {
    const float* in = features_ + std::min(i, n_ - 1) * channels_;
    const double squares = kernels_.sum_of_squares(in, channels_);
    if (!(squares < INFINITY)) finite_ = false;
    factors_[i] = 1 / std::max(std::sqrt(squares), 1e-12);
    if (rows_) unit_row(i, rows_ + i * channels_);
    float* token = panels_ + first * channels_ + i - first;
    for (int64_t c = 0; panels_ && c < channels_; c += kPart) {
      float part[kPart];
      const int64_t here = std::min(kPart, channels_ - c);
      kernels_.scale(in + c, here, factors_[i], part);
      for (int64_t k = 0; k < here; ++k) token[(c + k) * kPanel] = part[k];
    }
  }
}

}  // namespace namedmask::cpu
