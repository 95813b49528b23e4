// SPDX-License-Identifier: MIT
// csrc/cuda/bilateral_solver.cu as a C library for test_cuda_emulator.py: plain pointers in, all on the CPU.
#include "../../../csrc/cuda/bilateral_solver.cu"

#include "views.h"

using namespace namedmask;

extern "C" void run(void* target, void* image, void* offsets, void* shapes, int32_t rows, int32_t photos, void* out,
                    void* workspace, int32_t workspace_size, const BilateralSettings* settings) {
  cuda::bilateral_solver(view(target, DType::kFloat32, rows), view(image, DType::kUInt8, rows, 3),
                         offsets_view(offsets, photos), shapes_view(shapes, photos), view(out, DType::kFloat32, rows),
                         view(workspace, DType::kInt32, workspace_size), *settings, {});
}
