// SPDX-License-Identifier: MIT
// The parts of resize that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kResizePad = 4;  // floats that blend_pixels may read and write beyond the end of a row

// The taps of the pixels of a row: pixel x has `count` taps from `first[x]` on, with weights[x * count ...]. Missing
// ones have the weight 0.
struct RowTaps {
  const int32_t* first;
  const float* weights;
  int64_t count;
};

struct ResizeKernels {
  // out[x * channels + c] = sum over the taps of pixel x of weight * row[tap * channels + c], x < width.
  void (*blend_pixels)(const float* row, const RowTaps& taps, int64_t width, int64_t channels, float* out);
  // out[i] = sum over k of weights[k] * rows[k * stride + i], i < n.
  void (*blend_byte_rows)(const uint8_t* rows, int64_t stride, const float* weights, int64_t taps, int64_t n,
                          float* out);
  void (*blend_float_rows)(const float* rows, int64_t stride, const float* weights, int64_t taps, int64_t n,
                           float* out);
  void (*to_floats)(const uint8_t* values, int64_t n, float* out);
  void (*to_bytes)(const float* values, int64_t n, uint8_t* out);  // rounds to nearest and clamps
};

NMK_DECLARE_LEVELS(ResizeKernels, resize);

}  // namespace namedmask::cpu
