// SPDX-License-Identifier: MIT
// kWidth channels of a pixel, vertex or node, read and written as one vector. A pixel of `vectors` vectors has kWidth *
// vectors channels; element k of vector v is channel k * vectors + v, so that the threads of neighboring vectors access
// neighboring elements of an array [pixels, channels].
#pragma once

#include <cuda_runtime.h>

namespace namedmask::cuda {

template <int kWidth>
struct alignas(4 * kWidth) Channels {
  float of[kWidth];

  // `other` is a copy, so that it is loaded as one vector.
  __device__ void add(float weight, Channels other) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) of[k] += weight * other.of[k];
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) of[k] *= factor;
  }
};

}  // namespace namedmask::cuda
