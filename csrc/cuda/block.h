// SPDX-License-Identifier: MIT
// Reductions over a thread block, in a fixed order, so that results are bit-identical in every run.
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

// Reduces the values of all lanes with `combine` (commutative); the result is in every lane.
template <class T, class F>
__device__ T warp_reduce(T value, F combine) {
  for (int step = 16; step; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// The same over a block of kWarps warps, a power of two, for several values; two barriers.
template <int kWarps, class T, int kCount, class F>
__device__ void block_reduce(T (&values)[kCount], F combine) {
  __shared__ T parts[kCount][kWarps];
  __syncthreads();  // the parts of the last call have been read
  for (int i = 0; i < kCount; ++i) {
    const T of_warp = warp_reduce(values[i], combine);
    if (threadIdx.x % 32 == 0) parts[i][threadIdx.x / 32] = of_warp;
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) {
    T value = parts[i][threadIdx.x % kWarps];
    for (int step = kWarps / 2; step; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    values[i] = value;
  }
}

template <int kWarps, class T, class F>
__device__ T block_reduce(T value, F combine) {
  T values[1] = {value};
  block_reduce<kWarps>(values, combine);
  return values[0];
}

// The inclusive scan of the values of the lanes.
__device__ inline int32_t inclusive_scan(int32_t value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int step = 1; step < 32; step *= 2) {
    const int32_t left = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += left;
  }
  return value;
}

}  // namespace namedmask::cuda
