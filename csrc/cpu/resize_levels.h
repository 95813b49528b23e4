// SPDX-License-Identifier: MIT
// The parts of resize that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kResizePad = 4;    // floats that blend_pixels may read and write beyond the end of a row
constexpr int64_t kResizeRows = 32;  // that are transposed together

// The taps of the pixels of an axis: pixel x has counts[x] taps from first[x] on, at most `most`. No others are read:
// times a weight of 0, NaN and Inf would be NaN.
struct FloatTaps {
  const int32_t *first, *counts;
  const float* weights;  // [pixels, most]
  int64_t most;
};

// The integer weights of pixel x sum to 1 << shifts[x].
struct ByteTaps {
  const int32_t *first, *counts;
  const int16_t* weights;  // [pixels, most rounded up to even], 0 after the last tap
  const int32_t* shifts;
  int64_t most;
};

struct ResizeKernels {
  // out[x * channels + c] = sum over the taps of pixel x of weight * row[tap * channels + c], x < width.
  void (*blend_pixels)(const float* row, const FloatTaps& taps, int64_t width, int64_t channels, float* out);
  // out[i] = sum over the taps of pixel y of weight * rows[tap * n + i], i < n.
  void (*blend_rows)(const float* rows, const FloatTaps& taps, int64_t y, int64_t n, float* out);
  // The same for `count` pixels y, y + 1, ..., whose results follow each other; rounded to nearest and clamped.
  void (*blend_bytes)(const uint8_t* rows, const ByteTaps& taps, int64_t y, int64_t count, int64_t n, uint8_t* out);
  // out[i * kResizeRows + r] = rows[r * n + i] for r < count, i < n. The others are unspecified.
  void (*to_columns)(const uint8_t* rows, int64_t count, int64_t n, uint8_t* out);
  // The inverse.
  void (*to_rows)(const uint8_t* columns, int64_t count, int64_t n, uint8_t* out);
};

NMK_DECLARE_LEVELS(ResizeKernels, resize);

}  // namespace namedmask::cpu
