// SPDX-License-Identifier: MIT
// Clusters: groups of thread blocks that run at the same time and can wait for each other, on sm_90 and later.
#pragma once

#include "launch.h"

namespace namedmask::cuda {

#ifdef __CUDACC__  // tests/kernels/cuda_emulator defines its own

// Waits for all threads of all blocks of the cluster. What each wrote before, to any memory, the others then read.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#elif defined(__CUDA_ARCH__)
  __trap();  // has_clusters is false
#endif
}

#endif

// Whether the code of a kernel that the current device runs can be launched in clusters.
template <class... Parameters>
bool has_clusters(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

// `launch` with blocks in clusters of `size`: consecutive ones, on different multiprocessors if there are enough.
template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int size, dim3 threads, Stream stream,
                     typename Same<Parameters>::Type... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace namedmask::cuda
