// SPDX-License-Identifier: MIT
// emulated_cuda: what namedmask_kernels._native.cuda is on a GPU, and what the emulator's own tests call.
#include <cuda_runtime.h>

#include "../../../csrc/bindings/cuda_module.h"
#include "../../../csrc/bindings/dlpack_reader.h"

PYBIND11_MODULE(emulated_cuda, m) {
  namedmask::bindings::define_cuda(m);
  m.def("seed", [](unsigned value) { emulator::random.seed(value); });  // of the order in which threads run
  m.def("fail_launches", [](bool fail) { emulator::launch_error = fail ? 1 : cudaSuccess; });
  m.def("use_clusters", [](bool use) { emulator::ptx_version = use ? 90 : 80; });
}
