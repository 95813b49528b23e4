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
        for (int v = 0; v < kVectors; ++v) store(weights + (r + i) * kBlock + column + v * kLanes, sums[i][v]);
      }
    }
  }
  // apart from the products, which would lose registers to it
  for (int64_t i = 0; i < kBlock * kBlock; i += kLanes) {
    store(weights + i, exponential(broadcast(sharpness) * (load(weights + i) - broadcast(1.0f))));
  }
}

// As multiply_add of lanes.h, with the weights' transpose: row i of the result takes weights[k * kBlock + i].
inline __attribute__((always_inline)) void multiply_add_turned(V (&sums)[kRows][kVectors], const float* weights,
                                                               const float* masks, int64_t width) {
  for (int64_t k = 0; k < kBlock; ++k) {
    V b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load(masks + k * width + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const V factor = broadcast(weights[k * kBlock + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(factor, b[v], sums[i][v]);
    }
  }
}

void add(const float* weights, bool turned, const float* masks, int64_t width, float* sums) {
  for (int64_t r = 0; r < kBlock; r += kRows) {
    for (int64_t column = 0; column < width; column += kVectors * kLanes) {
      V part[kRows][kVectors] = {};
      if (turned) {
        multiply_add_turned(part, weights + r, masks + column, width);
      } else {
        const auto columns = [=](int v) { return masks + column + v * kLanes; };
        multiply_add(part, weights + r * kBlock, kBlock, columns, width, kBlock);
      }
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
