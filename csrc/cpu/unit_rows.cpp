// SPDX-License-Identifier: MIT
#include "unit_rows.h"

#include <algorithm>
#include <cmath>

namespace namedmask::cpu {
namespace {

// The lanes' sum in the order that halving a vector gives.
double fold(const double (&lanes)[8]) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

double sum_of_squares(const float* row, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += static_cast<double>(row[i + l]) * row[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += static_cast<double>(row[i]) * row[i];
  return fold(lanes);
}

}  // namespace

double dot(const double* a, const double* b, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
  return fold(lanes);
}

void UnitRows::prepare(const float* features, int64_t n, int64_t channels, bool rows, bool panels) {
  features_ = features, n_ = n, channels_ = channels, padded_ = round_up(n, kBlock);
  rows_ = rows ? row_memory_.reserve(padded_ * channels_) : nullptr;
  panels_ = panels ? panel_memory_.reserve(padded_ * channels_) : nullptr;
  factors_.reserve(padded_);
  finite_ = true;
}

void UnitRows::unit_row(int64_t i, float* out, int64_t stride) const {
  const float* in = features_ + std::min(i, n_ - 1) * channels_;
  const double factor = factors_[i];
  if (stride == 1) {  // a loop of its own, of vectors
    for (int64_t c = 0; c < channels_; ++c) out[c] = static_cast<float>(in[c] * factor);
  } else {
    for (int64_t c = 0; c < channels_; ++c) out[c * stride] = static_cast<float>(in[c] * factor);
  }
}

void UnitRows::normalise(int64_t panel) {
  const int64_t first = panel * kPanel;
  for (int64_t i = first; i < first + kPanel; ++i) {
    const double squares = sum_of_squares(features_ + std::min(i, n_ - 1) * channels_, channels_);
    if (!(squares < INFINITY)) finite_ = false;
    factors_[i] = 1 / std::max(std::sqrt(squares), 1e-12);
    float* token = panels_ + first * channels_ + i - first;
    if (!rows_) {
      unit_row(i, token, kPanel);
      continue;
    }
    float* row = rows_ + i * channels_;
    unit_row(i, row);
    for (int64_t c = 0; panels_ && c < channels_; ++c) token[c * kPanel] = row[c];
  }
}

}  // namespace namedmask::cpu
