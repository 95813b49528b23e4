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

// above() compares bytes first if they are expected to leave at most this share of the pairs unsure: 0.04 for scenes as
// in the benches. An AMD EPYC with AVX-512 decides a tenth of the pairs one by one in the time that bytes save.
constexpr double kFewPairs = 0.1;

}  // namespace

Cosines::Cosines() : kernels_(kernels()) {}

void Cosines::prepare(const float* features, int64_t n, int64_t channels, Products products, double tau) {
  channels_ = channels;
  const bool bytes_fit = channels <= kMaxByteChannels;
  const bool integers = kernels_.quantize && n > 0 && channels > 0 && (bytes_fit || products != Products::kInt8);
  products_ = integers ? products : Products::kFloat32;
  rows_.prepare(features, n, channels, /*rows=*/true, /*panels=*/products_ == Products::kFloat32);
  bytes_first_ = false;
  if (products_ == Products::kFloat32) return;
  if (bytes_fit) find_center(features, n);
  if (products_ == Products::kInt16) {
    bytes_first_ = bytes_fit && bytes_decide_most(features, n, tau);
    pairs_ = (channels + 1) / 2;
    integers_ = integer_memory_.reserve((bytes_first_ ? 2 : 4) * pairs_ * padded());
    integer_panels_ = bytes_first_ ? nullptr : integers_ + 2 * pairs_ * padded();
    errors_.assign(panels(), 0.0);
  }
  if (products_ == Products::kInt8 || bytes_first_) prepare_bytes();
}

void Cosines::find_center(const float* features, int64_t n) {
  std::vector<double> sum(channels_, 0.0);
  double lengths = 0;
  for (int64_t k = 0; k < kSamples; ++k) {
    const float* row = features + k * n / kSamples * channels_;
    double squares = 0;
    for (int64_t c = 0; c < channels_; ++c) sum[c] += row[c], squares += static_cast<double>(row[c]) * row[c];
    lengths += std::sqrt(squares);
  }
  center_.resize(channels_);
  center_square_ = 0;
  for (int64_t c = 0; c < channels_; ++c) {
    center_[c] = static_cast<float>(lengths > 0 && lengths < INFINITY ? sum[c] / lengths : 0);
    center_square_ += static_cast<double>(center_[c]) * center_[c];
  }
}

// Whether the errors of bytes are likely to leave few pairs unsure, judged by the samples. This decides the speed
// alone.
bool Cosines::bytes_decide_most(const float* features, int64_t n, double tau) const {
  constexpr double kWider = 4;  // counts pairs within several times the errors: there are only 120 of them
  std::vector<double> units(kSamples * channels_);
  double lengths[kSamples], errors[kSamples];
  for (int64_t k = 0; k < kSamples; ++k) {
    const float* row = features + k * n / kSamples * channels_;
    double* unit = units.data() + k * channels_;
    std::copy_n(row, channels_, unit);
    const double factor = 1 / std::max(std::sqrt(dot(unit, unit, channels_)), 1e-12);
    double largest = 0, square = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      unit[c] *= factor;
      const double apart = unit[c] - center_[c];
      largest = std::max(largest, std::abs(apart)), square += apart * apart;
    }
    lengths[k] = std::sqrt(square);
    errors[k] = largest / 127 * std::sqrt(static_cast<double>(channels_) / 12);  // as if uniformly distributed
  }
  double unsure = 0, pairs = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const double cosine = dot(units.data() + i * channels_, units.data() + j * channels_, channels_);
      const double off = errors[i] * lengths[j] + errors[j] * lengths[i];
      unsure += std::abs(cosine - tau) < kWider * off ? 1 / kWider : 0, ++pairs;
    }
  }
  return unsure <= kFewPairs * pairs;
}

void Cosines::prepare_bytes() {
  const int64_t size = round_up(channels_, kByteGroup) * padded();
  bytes_.panels = byte_memory_.reserve(2 * size);
  bytes_.rows = reinterpret_cast<int8_t*>(bytes_.panels + size);
  bytes_.sums = sum_memory_.reserve(padded());
  bytes_.units = number_memory_.reserve(4 * padded());
  bytes_.lengths = bytes_.units + padded(), bytes_.along = bytes_.lengths + padded();
  bytes_.errors = bytes_.along + padded();
  bytes_.center = center_.data();
}

void Cosines::normalize(int64_t panel) {
  rows_.normalize(panel);
  if (!rows_.finite()) return;  // NaN has no integer, and the image is rejected
  const int64_t first = panel * kPanel;
  if (products_ == Products::kInt8 || bytes_first_) {
    for (int64_t i = first; i < first + kPanel; ++i) kernels_.quantize_bytes(rows_.row(i), channels_, i, bytes_);
  }
  if (products_ != Products::kInt16) return;
  double largest = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    int16_t* row = integers_ + (first + i) * 2 * pairs_;
    largest = std::max(largest, kernels_.quantize(rows_.row(first + i), channels_, row));
    if (bytes_first_) continue;
    int16_t* pair = integer_panels_ + first * 2 * pairs_ + 2 * i;
    for (int64_t k = 0; k < pairs_; ++k) std::memcpy(pair + k * 2 * kPanel, row + 2 * k, 2 * sizeof *row);
  }
  errors_[panel] = std::sqrt(largest);
}

// A sum of float products is off by at most half a unit in the last place per addition and product. Bytes take two such
// sums, of the center with vectors of at most twice the length.
double Cosines::reach_of_bytes() const { return 4 * static_cast<double>(channels_ + 1) * 0x1p-24 + kRoundingOfBytes; }

double Cosines::reach() const {
  if (products_ == Products::kFloat32) return static_cast<double>(channels_ + 1) * 0x1p-24 + kRounding;
  if (products_ == Products::kInt8) return reach_of_bytes();
  // Errors e of vectors of length kUnit change their product by at most (kUnit + kUnit + e) e.
  const double e = *std::max_element(errors_.begin(), errors_.end()) / kUnit;
  return (2 * (1 + kRounding) + e) * e + kRounding;
}

void Cosines::above(int64_t row, int64_t count, int64_t column, int64_t words, double tau, double reach, uint32_t* bits,
                    int64_t stride) const {
  const float threshold = tau >= 1 ? INFINITY : static_cast<float>(tau);
  if (products_ == Products::kFloat32) {
    for (int64_t word = 0; word < words; ++word) {
      kernels_.connect(rows_.row(row), count, rows_.panel_of(column + word * kWord), channels_, threshold,
                       bits + word * stride);
    }
    return;
  }
  const double squared = static_cast<double>(kUnit) * kUnit;
  const auto low = static_cast<int32_t>(std::floor((tau - reach) * squared));
  const auto high = static_cast<int32_t>(std::ceil((tau + reach) * squared));
  const double center = tau - center_square_, off = reach_of_bytes() + kRounding;
  const int16_t* rows = integers_ + row * 2 * pairs_;
  uint32_t unsure[kTileWords * kBlock];
  for (int64_t word = 0; word < words; ++word) {
    const int64_t at = column + word * kWord;
    uint32_t *over = bits + word * stride, *left = unsure + word * kBlock;
    if (bytes_first_) {
      kernels_.compare_bytes(bytes_, row, count, at, channels_, static_cast<float>(center - off),
                             static_cast<float>(center + off), over, left);
    } else {
      kernels_.connect_quantized(rows, count, integer_panels_ + at * 2 * pairs_, channels_, low, high, over, left);
    }
  }
  if (bytes_first_) {
    kernels_.decide(rows, count, integers_ + column * 2 * pairs_, words, channels_, low, high, unsure, bits, stride);
  }
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t r = 0; r < count; ++r) {
      for (uint32_t left = unsure[word * kBlock + r]; left; left &= left - 1) {
        const int bit = __builtin_ctz(left);
        const float cosine = kernels_.dot(rows_.row(row + r), rows_.row(column + word * kWord + bit), channels_);
        bits[word * stride + r] |= static_cast<uint32_t>(cosine > threshold) << bit;
      }
    }
  }
}

void Cosines::maybe_below(int64_t row, int64_t count, int64_t column, double bound, double reach,
                          uint32_t* bits) const {
  if (products_ == Products::kInt8) {
    const auto most = static_cast<float>(bound + reach - center_square_);
    uint32_t unsure[kBlock];
    kernels_.compare_bytes(bytes_, row, count, column, channels_, most, most, bits, unsure);
  } else {
    kernels_.connect(rows_.row(row), count, rows_.panel_of(column), channels_, static_cast<float>(bound + reach), bits);
  }
  for (int64_t r = 0; r < count; ++r) bits[r] = ~bits[r];
}

}  // namespace namedmask::cpu
