// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack_reader.h"

namespace namedmask::bindings {

// Binds a function of TensorViews, numbers and a Stream. Python passes the arguments by position; the GIL is released
// during the call. std::invalid_argument becomes ValueError.
template <class F>
void define(pybind11::module_& m, const char* name, F function) {
  m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace namedmask::bindings
