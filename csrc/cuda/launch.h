// SPDX-License-Identifier: MIT
// What every CUDA launcher needs: error checks, the right device, kernels started on the caller's stream.
//
// Kernels are started through `launch`, not through <<< >>>: the files are then plain C++ to
// tests/kernels/cuda_emulator, which runs their threads on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "namedmask/tensor_view.h"

namespace namedmask::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("namedmask_kernels: CUDA: ") + cudaGetErrorString(error));
}

// Makes an array's device the current one for the length of a scope.
class OnDevice {
 public:
  explicit OnDevice(const TensorView& view) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(view.device_index));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

template <class T>
struct Same {  // keeps a parameter out of template argument deduction
  using Type = T;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, Stream stream,
            typename Same<Parameters>::Type... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace namedmask::cuda
