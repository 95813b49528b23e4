// SPDX-License-Identifier: MIT
// Python array -> TensorView, by DLPack. torch (2.10 and later) has a table of C functions on the tensor type, which
// takes a fraction of a microsecond per tensor. numpy arrays of the most common types are read directly, including
// read-only ones (do not pass one as an output: there is no check). All other arrays go through their __dlpack__()
// method.
#pragma once

#include <pybind11/pybind11.h>

#include "namedmask/tensor_view.h"

namespace namedmask::bindings {

// Fills `view` and returns the object that must stay alive while the view is in use.
// Throws TypeError if `array` does not support DLPack, has no memory (a FakeTensor) or an unsupported dtype.
pybind11::object read_dlpack(pybind11::handle array, TensorView& view);

}  // namespace namedmask::bindings

namespace pybind11::detail {

// Bound functions take `const TensorView&` and are called with any array that supports DLPack.
template <>
struct type_caster<namedmask::TensorView> {
  PYBIND11_TYPE_CASTER(namedmask::TensorView, const_name("array"));

  bool load(handle source, bool) {
    owner_ = namedmask::bindings::read_dlpack(source, value);
    return true;
  }

 private:
  object owner_;
};

// Bound functions take a Stream and are called with torch.cuda.current_stream().cuda_stream, an int.
template <>
struct type_caster<namedmask::Stream> {
  PYBIND11_TYPE_CASTER(namedmask::Stream, const_name("int"));

  bool load(handle source, bool) {
    value.handle = PyLong_AsVoidPtr(source.ptr());
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
