// SPDX-License-Identifier: MIT
#include "cosines.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "level.h"

namespace namedmask::cpu {
namespace {

const CosineKernels& kernels() {
#if defined(__x86_64__)
  if (level() >= Level::kAVX512VNNI) return cosines_avx512_vnni;
  if (level() == Level::kAVX512) return cosines_avx512;
  if (level() == Level::kAVX2) return cosines_avx2;
#endif
  return cosines_portable;
}

// Rounding of the unit rows to floats, which the cosine has by definition, changes their length by less.
constexpr double kRounding = 1e-6;

}  // namespace

Cosines::Cosines() : kernels_(kernels()) {}

void Cosines::prepare(const float* features, int64_t n, int64_t channels, bool integers) {
  channels_ = channels;
  quantised_ = integers && kernels_.connect_quantised && n > 0 && channels > 0;
  rows_.prepare(features, n, channels, /*rows=*/true, /*panels=*/!quantised_);
  if (!quantised_) return;
  pairs_ = (channels + 1) / 2;
  integers_ = integer_memory_.reserve(4 * pairs_ * padded());
  integer_panels_ = integers_ + 2 * pairs_ * padded();
  errors_.assign(panels(), 0.0);
}

void Cosines::normalise(int64_t panel) {
  rows_.normalise(panel);
  if (!quantised_) return;
  const int64_t first = panel * kPanel;
  double largest = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    int16_t* row = integers_ + (first + i) * 2 * pairs_;
    largest = std::max(largest, kernels_.quantise(rows_.row(first + i), channels_, row));
    int16_t* pair = integer_panels_ + first * 2 * pairs_ + 2 * i;
    for (int64_t k = 0; k < pairs_; ++k) std::memcpy(pair + k * 2 * kPanel, row + 2 * k, 2 * sizeof *row);
  }
  errors_[panel] = std::sqrt(largest);
}

double Cosines::reach() const {
  // A sum of float products is off by half a unit in the last place for each addition and product at most.
  if (!quantised_) return static_cast<double>(channels_ + 1) * 0x1p-24 + kRounding;
  // Vectors of length kUnit that are off by e have products off by (kUnit + kUnit + e) e at most.
  const double e = *std::max_element(errors_.begin(), errors_.end()) / kUnit;
  return (2 * (1 + kRounding) + e) * e + kRounding;
}

void Cosines::compare(int64_t row, int64_t count, int64_t column, double low, double high, uint32_t* bits,
                      uint32_t* unsure) const {
  const double squared = static_cast<double>(kUnit) * kUnit;
  kernels_.connect_quantised(integers_ + row * 2 * pairs_, count, integer_panels_ + column * 2 * pairs_, channels_,
                             static_cast<int32_t>(std::floor(low * squared)),
                             static_cast<int32_t>(std::ceil(high * squared)), bits, unsure);
}

void Cosines::above(int64_t row, int64_t count, int64_t column, double tau, double reach, uint32_t* bits) const {
  const float threshold = tau >= 1 ? INFINITY : static_cast<float>(tau);
  if (!quantised_) {
    kernels_.connect(rows_.row(row), count, rows_.panel_of(column), channels_, threshold, bits);
    return;
  }
  uint32_t unsure[kBlock];
  compare(row, count, column, tau - reach, tau + reach, bits, unsure);
  for (int64_t r = 0; r < count; ++r) {
    for (uint32_t left = unsure[r]; left; left &= left - 1) {
      const int bit = __builtin_ctz(left);
      const float cosine = kernels_.dot(rows_.row(row + r), rows_.row(column + bit), channels_);
      bits[r] |= static_cast<uint32_t>(cosine > threshold) << bit;
    }
  }
}

void Cosines::maybe_below(int64_t row, int64_t count, int64_t column, double bound, double reach,
                          uint32_t* bits) const {
  if (quantised_) {
    uint32_t ignored[kBlock];
    compare(row, count, column, bound + reach, bound + reach, bits, ignored);
  } else {
    kernels_.connect(rows_.row(row), count, rows_.panel_of(column), channels_, static_cast<float>(bound + reach), bits);
  }
  for (int64_t r = 0; r < count; ++r) bits[r] = ~bits[r];
}

}  // namespace namedmask::cpu
