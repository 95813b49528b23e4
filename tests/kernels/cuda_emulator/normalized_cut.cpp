// SPDX-License-Identifier: MIT
// csrc/cuda/normalized_cut.cu as a C library for emulator.py: plain pointers in, all on the CPU.
#include "../../../csrc/cuda/normalized_cut.cu"

#include "views.h"

using namespace namedmask;

extern "C" void run(void* bits, int64_t words, void* offsets, void* shapes, int64_t photos, void* vector, int64_t rows,
                    void* value, void* residual, void* iterations, void* partition, void* seed, void* workspace,
                    int64_t doubles, double eps, double tolerance, int64_t max_iterations) {
  cuda::normalized_cut(view(bits, DType::kInt32, words), offsets_view(offsets, photos), shapes_view(shapes, photos),
                       view(vector, DType::kFloat32, rows), view(value, DType::kFloat64, photos),
                       view(residual, DType::kFloat64, photos), view(iterations, DType::kInt32, photos),
                       view(partition, DType::kBool, rows), view(seed, DType::kInt32, photos),
                       view(workspace, DType::kFloat64, doubles), eps, tolerance, max_iterations, {});
}
