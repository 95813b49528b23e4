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

// The type of the products: kInt16 for above(), which then uses bytes first where they decide most pairs, kInt8 for
// maybe_below(), kFloat32 for both and on CPUs without the others.
enum class Products { kFloat32, kInt16, kInt8 };

class Cosines {
 public:
  Cosines();

  // features [n, C]; tau as for above(). Does all allocation, so that normalize() may run in a parallel region.
  void prepare(const float* features, int64_t n, int64_t channels, Products products, double tau = 0);

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

  // Bit j of bits[w * stride + r], r < count, w < words: the cosine of tokens row + r and column + w * kWord + j, in
  // float32, exceeds tau. `count` is a multiple of kMicroRows and at most kBlock, `column` a multiple of kWord, `words`
  // at most kTileWords.
  void above(int64_t row, int64_t count, int64_t column, int64_t words, double tau, double reach, uint32_t* bits,
             int64_t stride) const;

  // The same layout for one word: bits[r] is set for all cosines below `bound`, and for some that are not.
  void maybe_below(int64_t row, int64_t count, int64_t column, double bound, double reach, uint32_t* bits) const;

 private:
  void find_center(const float* features, int64_t n);
  bool bytes_decide_most(const float* features, int64_t n, double tau) const;
  void prepare_bytes();
  double reach_of_bytes() const;

  const CosineKernels& kernels_;
  int64_t channels_ = 0;
  NormalizedRows rows_;
  Products products_ = Products::kFloat32;
  bool bytes_first_ = false;  // above() compares bytes, then 16-bit integers where these leave doubt
  int64_t pairs_ = 0;         // of channels
  Buffer<int16_t> integer_memory_;
  int16_t *integers_ = nullptr, *integer_panels_ = nullptr;
  std::vector<double> errors_;  // the largest of each panel
  Buffer<uint8_t> byte_memory_;
  Buffer<int32_t> sum_memory_;
  Buffer<float> number_memory_;
  Bytes bytes_ = {};
  std::vector<float> center_;
  double center_square_ = 0;
};

}  // namespace namedmask::cpu
