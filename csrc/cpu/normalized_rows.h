// SPDX-License-Identifier: MIT
// The features of an image as unit vectors, in the layout for products of all tokens with all, and dot products of
// doubles.
#pragma once

#include <atomic>
#include <cstdint>

#include "buffer.h"
#include "normalized_rows_levels.h"
#include "panel.h"

namespace namedmask::cpu {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A dot product with eight partial sums in a fixed order, which the compiler vectorizes.
double dot(const double* a, const double* b, int64_t n);

class NormalizedRows {
 public:
  NormalizedRows();

  // features [n, C]; tokens are padded to a multiple of kBlock. `rows` and `panels` select the layouts. Does all
  // allocation, so that normalize() may run in a parallel region.
  void prepare(const float* features, int64_t n, int64_t channels, bool rows, bool panels);

  int64_t panels() const { return padded_ / kPanel; }

  // Divides the rows of one panel by max(norm, 1e-12) and writes them row-major, as a panel or both. Rows beyond n
  // repeat the last one, so that they add no new cosine. Threads may share the panels.
  void normalize(int64_t panel);

  // False if a row contains NaN or Inf; valid when all panels are done.
  bool finite() const { return finite_; }

  // out [C] = row i, bit-identical to the panels; valid when its panel is done.
  void unit_row(int64_t i, float* out) const;

  const float* row(int64_t i) const { return rows_ + i * channels_; }
  const float* panel_of(int64_t i) const { return panels_ + i * channels_; }  // i a multiple of kPanel
  int64_t padded() const { return padded_; }
  size_t bytes() const { return row_memory_.bytes() + panel_memory_.bytes() + factors_.bytes(); }

 private:
  const NormalizedRowsKernels& kernels_;
  const float* features_ = nullptr;
  int64_t n_ = 0, channels_ = 0, padded_ = 0;
  Buffer<float> row_memory_, panel_memory_;
  float *rows_ = nullptr, *panels_ = nullptr;
  Buffer<double> factors_;
  std::atomic<bool> finite_{true};
};

}  // namespace namedmask::cpu
