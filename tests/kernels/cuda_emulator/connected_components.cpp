// SPDX-License-Identifier: MIT
// csrc/cuda/connected_components.cu as a C library for test_cuda_emulator.py: plain pointers in, all on the CPU.
#include "../../../csrc/cuda/connected_components.cu"

#include "views.h"

using namespace namedmask;

extern "C" void run(const char* op, void* in, void* offsets, void* shapes, int32_t rows, int32_t photos, void* out,
                    void* counts, void* areas, void* boxes, int32_t components, void* workspace) {
  const std::string name = op;
  const TensorView begins = offsets_view(offsets, photos);
  const TensorView grids = shapes_view(shapes, photos);
  const TensorView mask = view(in, DType::kBool, rows), mask_out = view(out, DType::kBool, rows);
  const TensorView labels = view(out, DType::kInt32, rows), found = view(counts, DType::kInt32, photos);
  const TensorView scratch = view(workspace, DType::kInt32, 2 * rows + 4 * photos);
  if (name == "connected_components") {
    cuda::connected_components(mask, begins, grids, labels, found, scratch, {});
  } else if (name == "component_stats") {
    cuda::component_stats(view(in, DType::kInt32, rows), begins, grids, found, view(areas, DType::kInt32, components),
                          view(boxes, DType::kInt32, components, 4), {});
  } else if (name == "largest_component") {
    cuda::largest_component(mask, begins, grids, mask_out, scratch, {});
  } else {
    cuda::fill_holes(mask, begins, grids, mask_out, scratch, {});
  }
}
