// SPDX-License-Identifier: MIT
// random_walk's inner loops, included by one file per instruction level; level.h says what is allowed here.
#include "exponential.h"
#include "lanes.h"
#include "random_walk_levels.h"

namespace namedmask::cpu {
namespace {

static_assert(kBlock % kRows == 0 && kBlock % (kVectors * kLanes) == 0 && kWalkUnit % (kVectors * kLanes) == 0);

void weigh(const float* rows, const float* panels, int64_t channels, float sharpness, float* weights) {
  for (int64_t column = 0; column < kBlock; column += kVectors * kLanes) {
    const auto columns = [=](int v) {
      const int64_t at = column + v * kLanes;
      return panels + at / kPanel * channels * kPanel + at % kPanel;
    };
    for (int64_t r = 0; r < kBlock; r += kRows) {
      V sums[kRows][kVectors] = {};
      multiply_add(sums, rows + r * channels, channels, columns, kPanel, channels);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const V distance = sums[i][v] - broadcast(1.0f);
          store(weights + (r + i) * kBlock + column + v * kLanes, exponential(broadcast(sharpness) * distance));
        }
      }
    }
  }
}

void add(const float* weights, bool turned, const float* masks, int64_t width, float* sums) {
  float block[kBlock * kRows];  // kRows rows of the weights' transpose
  for (int64_t r = 0; r < kBlock; r += kRows) {
    const float* factors = weights + r * kBlock;
    if (turned) {
      for (int64_t k = 0; k < kBlock; ++k) {
        for (int i = 0; i < kRows; ++i) block[i * kBlock + k] = weights[k * kBlock + r + i];
      }
      factors = block;
    }
    for (int64_t column = 0; column < width; column += kVectors * kLanes) {
      V part[kRows][kVectors] = {};
      multiply_add(part, factors, kBlock, [=](int v) { return masks + column + v * kLanes; }, width, kBlock);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          float* sum = sums + (r + i) * width + column + v * kLanes;
          store(sum, load(sum) + part[i][v]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace namedmask::cpu
