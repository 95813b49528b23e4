// SPDX-License-Identifier: MIT
// emulated_cuda: what namedmask_kernels._native.cuda is on a GPU, and what the emulator's own tests call.
#include <cuda_runtime.h>

#include "../../../csrc/bindings/cuda_module.h"
#include "../../../csrc/bindings/dlpack_reader.h"
#include "sort.h"

namespace py = pybind11;

namespace namedmask {
namespace {

// Sorts the numbers 0 .. n - 1 by their int32 keys [n]; `first` and `second` are int32 [2, n]. Returns 0 if the sorted
// keys and numbers are in `first`, 1 if in `second`.
int sort_numbers(const TensorView& keys, int bits, const TensorView& first, const TensorView& second,
                 const TensorView& scratch) {
  const int64_t n = keys.size();
  const auto rows = [n](const TensorView& view) { return cuda::Sorted{view.as<int32_t>(), view.as<int32_t>() + n}; };
  const cuda::Sorted sorted =
      cuda::sort_numbers(keys.as<int32_t>(), n, bits, rows(first), rows(second), scratch.as<int32_t>(), {});
  return sorted.keys == first.data ? 0 : 1;
}

}  // namespace
}  // namespace namedmask

PYBIND11_MODULE(emulated_cuda, m) {
  namedmask::bindings::define_cuda(m);
  m.def("seed", [](unsigned value) { emulator::random.seed(value); });  // of the order in which threads run
  m.def("fail_launches", [](bool fail) { emulator::launch_error = fail ? 1 : cudaSuccess; });
  m.def("use_clusters", [](bool use) { emulator::ptx_version = use ? 90 : 80; });
  m.def("sort_scratch", &namedmask::cuda::sort_scratch);
  m.def("sort_numbers", &namedmask::sort_numbers);
}
