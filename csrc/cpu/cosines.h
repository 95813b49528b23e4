// SPDX-License-Identifier: MIT
// Which pairs of tokens of an image have a cosine above or below a bound, as words of 32 columns. On CPUs that multiply
// 16-bit integers twice as fast as floats, and 8-bit integers four times as fast, integers decide all but the few pairs
// close to the bound.
#pragma once

#include <cstdint>
#include <vector>

#include "cosines_levels.h"
#include "normalized_rows.h"

namespace namedmask::cpu {

// The type of the products: kInt16 for above(), kInt8 for maybe_below(), kFloat32 for both and on CPUs without the
// others.
enum class Products { kFloat32, kInt16, kInt8 };

class Cosines {
 public:
  Cosines();

  // features [n, C]. Does all allocation, so that normalize() may run in a parallel region.
  void prepare(const float* features, int64_t n, int64_t channels, Products products);

  int64_t panels() const { return rows_.panels(); }
  int64_t padded() const { return rows_.padded(); }
  const float* row(int64_t i) const { return rows_.row(i); }

  // Prepares one panel of tokens for products. Threads may share the panels; everything below requires all of them, and
  // finite rows.
  void normalize(int64_t panel);
  bool finite() const { return rows_.finite(); }
  size_t bytes() const {
    return rows_.bytes() + integer_memory_.bytes() + byte_memory_.bytes() + sum_memory_.bytes() +
           number_memory_.bytes();
  }

  // An upper bound for the error of the products; for bytes, in addition to the error of each row.
  double reach() const;

  // bits[r], r < count, bit j: the cosine of tokens row + r and column + j, in float32, exceeds tau. `count` is a
  // multiple of kMicroRows and at most kBlock, `column` a multiple of kWord.
  void above(int64_t row, int64_t count, int64_t column, double tau, double reach, uint32_t* bits) const;

  // The same layout: set for all cosines below `bound`, and for some that are not.
  void maybe_below(int64_t row, int64_t count, int64_t column, double bound, double reach, uint32_t* bits) const;

 private:
  void prepare_bytes(const float* features, int64_t n);

  const CosineKernels& kernels_;
  int64_t channels_ = 0;
  NormalizedRows rows_;
  Products products_ = Products::kFloat32;
  int64_t pairs_ = 0;  // of channels
  Buffer<int16_t> integer_memory_;
  int16_t *integers_ = nullptr, *integer_panels_ = nullptr;
  std::vector<double> errors_;  // the largest of each panel
  Buffer<uint8_t> byte_memory_;
  Buffer<int32_t> sum_memory_;
  Buffer<float> number_memory_;
  Bytes bytes_ = {};
  double center_square_ = 0;
};

}  // namespace namedmask::cpu
