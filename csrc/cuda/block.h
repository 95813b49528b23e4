// SPDX-License-Identifier: MIT
// What a thread block does together: sums and extremes in a fixed order, so that bits do not depend on the run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace namedmask::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Most {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// `combine` (commutative) of the values of all lanes, in every lane.
template <class T, class F>
__device__ T across_warp(T value, F combine) {
  for (int step = 16; step; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// The same of all threads of a block of kWarps warps, a power of two; two barriers.
template <int kWarps, class T, class F>
__device__ T across_block(T value, F combine) {
  __shared__ T parts[kWarps];
  value = across_warp(value, combine);
  __syncthreads();  // parts of the call before have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[threadIdx.x % kWarps];
  for (int step = kWarps / 2; step; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace namedmask::cuda
