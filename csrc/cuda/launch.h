// SPDX-License-Identifier: MIT
// Shared by all CUDA launchers: error checks, device selection, and kernel launches on the caller's stream.
//
// Kernels are started by `launch` instead of <<< >>>: the files are then plain C++ for tests/kernels/cuda_emulator,
// which runs their threads on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "namedmask/tensor_view.h"

namespace namedmask::cuda {

// Throws std::runtime_error; library.py adds the name of the operator.
inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets the error, which torch's next check would report again
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// Makes the device of an array current within a scope.
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
struct Same {  // excludes a parameter from template argument deduction
  using Type = T;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, Stream stream,
            typename Same<Parameters>::Type... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4000, "a kernel takes 4 kB of arguments");
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace namedmask::cuda
