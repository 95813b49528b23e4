// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

namespace namedmask::bindings {

// Adds the CUDA operators to a module, under the same names as the CPU's. Each takes the stream as its last argument:
// torch.cuda.current_stream().cuda_stream.
void define_cuda(pybind11::module_ m);

}  // namespace namedmask::bindings
