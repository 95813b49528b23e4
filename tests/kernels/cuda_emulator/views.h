// SPDX-License-Identifier: MIT
// Views of plain pointers, all on the CPU, for the launchers that test_cuda_emulator.py calls.
#pragma once

#include <cuda_runtime.h>

#include "namedmask/tensor_view.h"

// Begins another order of threads.
extern "C" void seed(unsigned value) { emulator::random.seed(value); }

namespace namedmask {

inline TensorView view(void* data, DType dtype, int64_t n, int64_t columns = -1, Device device = Device::kCUDA) {
  return {data, dtype, device, 0, columns < 0 ? 1 : 2, {n, columns}, {columns < 0 ? 1 : columns, 1}};
}

// The batch of `photos`, as every operator takes it.
inline TensorView offsets_view(void* offsets, int32_t photos) {
  return view(offsets, DType::kInt32, photos + 1, -1, Device::kCPU);
}
inline TensorView shapes_view(void* shapes, int32_t photos) {
  return view(shapes, DType::kInt32, photos, 2, Device::kCPU);
}

}  // namespace namedmask
