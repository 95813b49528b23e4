// SPDX-License-Identifier: MIT
// random_walk's inner loops, compiled once per instruction level; level.h describes the rules.
#include "exponential.h"
#include "random_walk_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

static_assert(kBlock % kRows == 0 && kWord % (kVectors * kLanes) == 0 && kWalkUnit % (kVectors * kLanes) == 0);

// The least exponent: e^-60 is lost in a sum with a token's own weight, about 1, but is not 0, so that a row of zeros,
// whose weights are all equal, has a sum. A cosine that is rounded up has an exponent above 0.
constexpr float kLeastExponent = -60;

void weigh(const float* rows, const float* panels, int64_t channels, float sharpness, int64_t columns, bool diagonal,
           float* weights) {
  for (int64_t column = 0; column < columns; column += kVectors * kLanes) {
    const auto tokens = [=](int v) {
      const int64_t at = column + v * kLanes;
      return panels + at / kPanel * channels * kPanel + at % kPanel;
    };
    // a diagonal tile is symmetric: only the part above the diagonal is computed, the rest is mirrored
    const int64_t end = diagonal ? column + kVectors * kLanes : kBlock;
    for (int64_t r = 0; r < end; r += kRows) {
      Floats sums[kRows][kVectors] = {};
      multiply_add(sums, rows + r * channels, channels, 1, tokens, kPanel, channels);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) store(weights + (r + i) * kBlock + column + v * kLanes, sums[i][v]);
      }
    }
  }
  for (int64_t r = kVectors * kLanes; diagonal && r < columns; ++r) {
    for (int64_t i = 0; i < r; ++i) weights[r * kBlock + i] = weights[i * kBlock + r];
  }
  // a separate loop, which does not take registers from the products
  for (int64_t r = 0; r < kBlock; ++r, weights += kBlock) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Floats exponent = broadcast(sharpness) * (load(weights + i) - broadcast(1.0f));
      store(weights + i,
            exponential<CephesTerms>(smaller(larger(exponent, broadcast(kLeastExponent)), broadcast(1.0f))));
    }
  }
}

// sums [kRows, kVectors * kLanes] += part.
inline __attribute__((always_inline)) void add_part(const Floats (&part)[kRows][kVectors], int64_t width, float* sums) {
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + i * width + v * kLanes;
      store(sum, load(sum) + part[i][v]);
    }
  }
}

void add(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums) {
  for (int64_t r = 0; r < kBlock; r += kRows) {
    for (int64_t m = 0; m < width; m += kVectors * kLanes) {
      Floats part[kRows][kVectors] = {};
      const auto vectors = [=](int v) { return masks + m + v * kLanes; };
      multiply_add(part, weights + r * kBlock, kBlock, 1, vectors, width, columns);
      add_part(part, width, sums + r * width + m);
    }
  }
}

void add_transposed(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums) {
  for (int64_t r = 0; r < columns; r += kRows) {
    for (int64_t m = 0; m < width; m += kVectors * kLanes) {
      Floats part[kRows][kVectors] = {};
      const auto vectors = [=](int v) { return masks + m + v * kLanes; };
      multiply_add(part, weights + r, 1, kBlock, vectors, width, kBlock);
      add_part(part, width, sums + r * width + m);
    }
  }
}

constexpr WalkKernels kKernels = {weigh, add, add_transposed};

}  // namespace
}  // namespace namedmask::cpu
