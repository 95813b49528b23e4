// SPDX-License-Identifier: MIT
#include "cosines.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "level.h"

namespace namedmask::cpu {
namespace {

const CosineKernels& kernels() { return NMK_BEST_OR_VNNI(cosines); }

// An upper bound for the change of a unit row's length by rounding to floats, which is part of the cosine's definition.
constexpr double kRounding = 1e-6;

// The same for bytes, including all rounding from a token to its bytes and from their products to a cosine: two dozen
// times half a unit in the last place of numbers up to 4.
constexpr double kRoundingOfBytes = 8e-6;

constexpr int64_t kSamples = 16;                        // tokens whose mean is the center of the bytes
constexpr int64_t kMaxByteChannels = int64_t{1} << 17;  // sums of more products of bytes may overflow 32 bits

}  // namespace

Cosines::Cosines() : kernels_(kernels()) {}

void Cosines::prepare(const float* features, int64_t n, int64_t channels, Products products) {
  channels_ = channels;
  const bool fits = products != Products::kInt8 || channels <= kMaxByteChannels;
  products_ = kernels_.quantize && n > 0 && channels > 0 && fits ? products : Products::kFloat32;
  rows_.prepare(features, n, channels, /*rows=*/true, /*panels=*/products_ == Products::kFloat32);
  if (products_ == Products::kInt8) prepare_bytes(features, n);
  if (products_ != Products::kInt16) return;
  pairs_ = (channels + 1) / 2;
  integers_ = integer_memory_.reserve(4 * pairs_ * padded());
  integer_panels_ = integers_ + 2 * pairs_ * padded();
  errors_.assign(panels(), 0.0);
}

void Cosines::prepare_bytes(const float* features, int64_t n) {
  const int64_t size = round_up(channels_, kByteGroup) * padded();
  bytes_.panels = byte_memory_.reserve(2 * size);
  bytes_.rows = reinterpret_cast<int8_t*>(bytes_.panels + size);
  bytes_.sums = sum_memory_.reserve(padded());
  bytes_.units = number_memory_.reserve(4 * padded() + channels_);
  bytes_.lengths = bytes_.units + padded(), bytes_.along = bytes_.lengths + padded();
  bytes_.errors = bytes_.along + padded(), bytes_.center = bytes_.errors + padded();
  std::vector<double> sum(channels_, 0.0);
  double lengths = 0;
  for (int64_t k = 0; k < kSamples; ++k) {
    const float* row = features + k * n / kSamples * channels_;
    double squares = 0;
    for (int64_t c = 0; c < channels_; ++c) sum[c] += row[c], squares += static_cast<double>(row[c]) * row[c];
    lengths += std::sqrt(squares);
  }
  center_square_ = 0;
  for (int64_t c = 0; c < channels_; ++c) {
    const auto mean = static_cast<float>(lengths > 0 && lengths < INFINITY ? sum[c] / lengths : 0);
    bytes_.center[c] = mean;
    center_square_ += static_cast<double>(mean) * mean;
  }
}

void Cosines::normalize(int64_t panel) {
  rows_.normalize(panel);
  if (!rows_.finite()) return;  // NaN has no integer, and the image is rejected
  const int64_t first = panel * kPanel;
  if (products_ == Products::kInt8) {
    for (int64_t i = first; i < first + kPanel; ++i) kernels_.quantize_bytes(rows_.row(i), channels_, i, bytes_);
  }
  if (products_ != Products::kInt16) return;
  double largest = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    int16_t* row = integers_ + (first + i) * 2 * pairs_;
    largest = std::max(largest, kernels_.quantize(rows_.row(first + i), channels_, row));
    int16_t* pair = integer_panels_ + first * 2 * pairs_ + 2 * i;
    for (int64_t k = 0; k < pairs_; ++k) std::memcpy(pair + k * 2 * kPanel, row + 2 * k, 2 * sizeof *row);
  }
  errors_[panel] = std::sqrt(largest);
}

double Cosines::reach() const {
  // A sum of float products is off by at most half a unit in the last place per addition and product. Bytes take two
  // such sums, of the center with vectors of at most twice the length.
  const double sum = static_cast<double>(channels_ + 1) * 0x1p-24;
  if (products_ == Products::kFloat32) return sum + kRounding;
  if (products_ == Products::kInt8) return 4 * sum + kRoundingOfBytes;
  // Errors e of vectors of length kUnit change their product by at most (kUnit + kUnit + e) e.
  const double e = *std::max_element(errors_.begin(), errors_.end()) / kUnit;
  return (2 * (1 + kRounding) + e) * e + kRounding;
}

void Cosines::above(int64_t row, int64_t count, int64_t column, double tau, double reach, uint32_t* bits) const {
  const float threshold = tau >= 1 ? INFINITY : static_cast<float>(tau);
  if (products_ == Products::kFloat32) {
    kernels_.connect(rows_.row(row), count, rows_.panel_of(column), channels_, threshold, bits);
    return;
  }
  const double squared = static_cast<double>(kUnit) * kUnit;
  uint32_t unsure[kBlock];
  kernels_.connect_quantized(integers_ + row * 2 * pairs_, count, integer_panels_ + column * 2 * pairs_, channels_,
                             static_cast<int32_t>(std::floor((tau - reach) * squared)),
                             static_cast<int32_t>(std::ceil((tau + reach) * squared)), bits, unsure);
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
  if (products_ == Products::kInt8) {
    const auto rest = static_cast<float>(bound + reach - center_square_);
    kernels_.maybe_below_bytes(bytes_, row, count, column, channels_, rest, bits);
    return;
  }
  kernels_.connect(rows_.row(row), count, rows_.panel_of(column), channels_, static_cast<float>(bound + reach), bits);
  for (int64_t r = 0; r < count; ++r) bits[r] = ~bits[r];
}

}  // namespace namedmask::cpu
