// SPDX-License-Identifier: MIT
// cosines' inner loop, included by one file per instruction level; level.h says what is allowed here.
#include "cosines_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

static_assert(kMicroRows % kRows == 0 && kWord % (kVectors * kLanes) == 0);

void connect(const float* rows, int64_t count, const float* panels, int64_t channels, float threshold, uint32_t* bits) {
  for (int64_t r = 0; r < count; ++r) bits[r] = 0;
  for (int part = 0; part < kWord; part += kVectors * kLanes) {
    const auto columns = [=](int v) {
      const int column = part + v * kLanes;
      return panels + column / kPanel * channels * kPanel + column % kPanel;
    };
    for (int64_t r = 0; r < count; r += kRows) {
      Floats sums[kRows][kVectors] = {};
      multiply_add(sums, rows + r * channels, channels, 1, columns, kPanel, channels);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          bits[r + i] |= above(sums[i][v], broadcast(threshold)) << (part + v * kLanes);
        }
      }
    }
  }
}

constexpr CosineKernels kKernels = {connect, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace namedmask::cpu
