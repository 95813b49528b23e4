// SPDX-License-Identifier: MIT
// Powers of two by which kernels multiply very large or small values, so that nothing overflows or vanishes; they do
// not round.
#pragma once

#include <float.h>
#include <math.h>  // fabsf, which std::fabs is not on a device

#include <cstdint>

#include "host_device.h"

namespace namedmask {

// The factor for values of up to `largest`: 1, or 2^-96 or 2^96 for values whose sums or products might leave the range
// of floats.
NMK_HOST_DEVICE inline float scale_of(float largest) {
  if (!(largest < 0x1p32f)) return 0x1p-96f;
  return largest >= 0x1p-32f || largest == 0 ? 1.0f : 0x1p96f;
}

// x / scale; finite values stay finite.
NMK_HOST_DEVICE inline float unscaled(float x, float scale) {
  const float y = x / scale;
  return fabsf(x) < INFINITY ? fminf(fmaxf(y, -FLT_MAX), FLT_MAX) : y;
}

// The largest absolute value, without NaN and Inf.
inline float largest_finite(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float size = fabsf(values[i]);
    largest = size > largest && size < INFINITY ? size : largest;
  }
  return largest;
}

}  // namespace namedmask
