// SPDX-License-Identifier: MIT
// csrc/cuda/spectral_clusters.cu as a C library for emulator.py: plain pointers in, all on the CPU.
#include "../../../csrc/cuda/spectral_clusters.cu"

#include "views.h"

using namespace namedmask;

extern "C" int64_t workspace(void* offsets, void* shapes, int64_t photos, void* counts, int64_t n_counts,
                             int64_t tokens, int64_t channels) {
  return cuda::spectral_clusters_workspace(offsets_view(offsets, photos), shapes_view(shapes, photos),
                                           view(counts, DType::kInt32, n_counts, -1, Device::kCPU), tokens, channels);
}

extern "C" void run(void* unit, int64_t tokens, int64_t channels, void* ranges, void* offsets, void* shapes,
                    int64_t photos, void* counts, int64_t n_counts, void* labels, void* scratch, int64_t doubles,
                    int64_t seed) {
  cuda::spectral_clusters(view(unit, DType::kFloat32, tokens, channels), view(ranges, DType::kFloat32, photos, 2),
                          offsets_view(offsets, photos), shapes_view(shapes, photos),
                          view(counts, DType::kInt32, n_counts, -1, Device::kCPU),
                          view(labels, DType::kInt32, tokens, n_counts), view(scratch, DType::kFloat64, doubles), seed,
                          {});
}
