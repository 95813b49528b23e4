// SPDX-License-Identifier: MIT
// random_walk's inner loops, compiled once per instruction level; level.h describes the rules.
#include "exponential.h"
#include "random_walk_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

static_assert(kBlock % kRows == 0 && kWord % (kVectors * kLanes) == 0 && kWalkUnit == 8);

// The least exponent: e^-60 is lost in a sum with a token's own weight, about 1, but is not 0, so that a row of zeros,
// whose weights are all equal, has a sum. A cosine that is rounded up has an exponent above 0.
constexpr float kLeastExponent = -60;

constexpr int64_t kCacheLine = 16;  // floats

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
      store(weights + i, exponential(smaller(larger(exponent, broadcast(kLeastExponent)), broadcast(1.0f))));
    }
  }
}

// sums [kRows, lanes of First and Second] += a times masks [depth, the same lanes], where column k of a begins at
// a + k * k_stride and its rows are row_stride apart.
template <class First, class Second, bool kBoth = true>
inline __attribute__((always_inline)) void add_products(const float* a, int64_t row_stride, int64_t k_stride,
                                                        int64_t depth, const float* masks, int64_t width, float* sums) {
  First first[kRows] = {};
  Second second[kRows] = {};
  for (int64_t k = 0; k < depth; ++k, a += k_stride, masks += width) {
    const First left = load<First>(masks);
    Second right = {};
    if constexpr (kBoth) right = load<Second>(masks + kLanesOf<First>);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Floats factor = broadcast(a[i * row_stride]);
      first[i] = fma(first_lanes_of<First>(factor), left, first[i]);
      if constexpr (kBoth) second[i] = fma(first_lanes_of<Second>(factor), right, second[i]);
    }
  }
  for (int i = 0; i < kRows; ++i, sums += width) {
    store(sums, load<First>(sums) + first[i]);
    if constexpr (kBoth) {
      float* sum = sums + kLanesOf<First>;
      store(sum, load<Second>(sum) + second[i]);
    }
  }
}

// The same for all columns, in vectors of eight lanes where wider ones do not fit.
inline __attribute__((always_inline)) void add_rows(const float* a, int64_t row_stride, int64_t k_stride, int64_t depth,
                                                    const float* masks, int64_t width, float* sums) {
  int64_t m = 0;
  for (; m + kVectors * kLanes <= width; m += kVectors * kLanes) {
    add_products<Floats, Floats>(a, row_stride, k_stride, depth, masks + m, width, sums + m);
  }
  const int64_t left = width - m;
  if constexpr (kLanes == 16) {
    if (left == 24) add_products<Floats, Floats8>(a, row_stride, k_stride, depth, masks + m, width, sums + m);
    if (left == 16) add_products<Floats, Floats, false>(a, row_stride, k_stride, depth, masks + m, width, sums + m);
  }
  if (left == 8) add_products<Floats8, Floats8, false>(a, row_stride, k_stride, depth, masks + m, width, sums + m);
}

void add(const float* weights, int64_t columns, const float* masks, int64_t width, const float* next, float* sums) {
  for (int64_t r = 0; r < kBlock; r += kRows) {
    for (int64_t i = 0; next && i < kRows * kBlock; i += kCacheLine) __builtin_prefetch(next + r * kBlock + i, 0, 2);
    add_rows(weights + r * kBlock, kBlock, 1, columns, masks, width, sums + r * width);
  }
}

void add_transposed(const float* weights, int64_t columns, const float* masks, int64_t width, float* sums) {
  for (int64_t r = 0; r < columns; r += kRows) {
    add_rows(weights + r, 1, kBlock, kBlock, masks, width, sums + r * width);
  }
}

constexpr WalkKernels kKernels = {weigh, add, add_transposed};

}  // namespace
}  // namespace namedmask::cpu
