// SPDX-License-Identifier: MIT
// Which pairs of an image's tokens have a cosine above or below a bound, 32 columns to a word of bits. On CPUs that
// multiply 16-bit integers twice as fast as floats, and 8-bit ones four times, these answer for all but the few pairs
// close to the bound.
#pragma once

#include <cstdint>
#include <vector>

#include "cosines_levels.h"
#include "normalized_rows.h"

namespace namedmask::cpu {

// By which products: kInt16 for above(), kInt8 for maybe_below(), kFloat32 for both, and on CPUs without the others.
enum class Products { kFloat32, kInt16, kInt8 };

class Cosines {
 public:
  Cosines();

  // features [n, C]. Allocates, so that normalize() may run in a parallel region.
  void prepare(const float* features, int64_t n, int64_t channels, Products products);

  int64_t panels() const { return rows_.panels(); }
  int64_t padded() const { return rows_.padded(); }
  const float* row(int64_t i) const { return rows_.row(i); }

  // A panel of tokens made ready for products; panels may be done by any threads. All else waits until all are done.
  void normalize(int64_t panel);
  bool finite() const { return rows_.finite(); }
  size_t bytes() const {
    return rows_.bytes() + integer_memory_.bytes() + byte_memory_.bytes() + sum_memory_.bytes() +
           number_memory_.bytes();
  }

  // How far a cosine may lie from what the products say; of bytes, beside the errors that each row has.
  double reach() const;

  // bits[r], r < count, bit j: the cosine of tokens row + r and column + j, in float32, exceeds tau. `count` is whole
  // micro rows, kBlock at most; column a multiple of kWord.
  void above(int64_t row, int64_t count, int64_t column, double tau, double reach, uint32_t* bits) const;

  // The same places: bits of all cosines below `bound`, and of some that are not.
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
  std::vector<double> errors_;  // of each panel, the largest
  Buffer<uint8_t> byte_memory_;
  Buffer<int32_t> sum_memory_;
  Buffer<float> number_memory_;
  Bytes bytes_ = {};
  double center_square_ = 0;
};

}  // namespace namedmask::cpu
