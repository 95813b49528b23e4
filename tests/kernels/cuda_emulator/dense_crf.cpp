// SPDX-License-Identifier: MIT
// csrc/cuda/dense_crf.cu as a C library for test_cuda_emulator.py: plain pointers in, all on the CPU.
#include "../../../csrc/cuda/dense_crf.cu"

#include "views.h"

using namespace namedmask;

extern "C" void lay_lattice(void* probabilities, void* image, void* offsets, void* shapes, int32_t rows, int32_t photos,
                            int32_t labels, void* out, void* status, void* workspace, const CrfSettings* settings) {
  cuda::dense_crf_lattice(view(probabilities, DType::kFloat32, rows, labels), view(image, DType::kUInt8, rows, 3),
                          offsets_view(offsets, photos), shapes_view(shapes, photos),
                          view(out, DType::kFloat32, rows, labels), view(status, DType::kInt32, 2, photos),
                          view(workspace, DType::kInt32, 49 * rows + photos), *settings, {});
}

extern "C" int64_t workspace_size(void* offsets, void* shapes, int32_t photos, int32_t labels, void* counts,
                                  const CrfSettings* settings) {
  return cuda::dense_crf_workspace(offsets_view(offsets, photos), shapes_view(shapes, photos),
                                   view(counts, DType::kInt32, photos, -1, Device::kCPU), labels, *settings);
}

extern "C" void infer(void* offsets, void* shapes, int32_t rows, int32_t photos, int32_t labels, void* out,
                      void* status, void* counts, void* lattice_workspace, void* workspace, int64_t workspace_size,
                      const CrfSettings* settings) {
  cuda::dense_crf(offsets_view(offsets, photos), shapes_view(shapes, photos), view(out, DType::kFloat32, rows, labels),
                  view(status, DType::kInt32, 2, photos), view(counts, DType::kInt32, photos, -1, Device::kCPU),
                  view(lattice_workspace, DType::kInt32, 49 * rows + photos),
                  view(workspace, DType::kInt32, workspace_size), *settings, {});
}

extern "C" int64_t sort_scratch(int64_t n) { return cuda::sort_scratch(n); }

// Returns which of the two rooms holds the sorted numbers.
extern "C" int32_t sort_numbers(int32_t* keys, int64_t n, int32_t bits, int32_t* first, int32_t* second,
                                int32_t* scratch) {
  const cuda::Sorted sorted = cuda::sort_numbers(keys, n, bits, {first, first + n}, {second, second + n}, scratch, {});
  return sorted.keys == first ? 0 : 1;
}
