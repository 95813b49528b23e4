// SPDX-License-Identifier: MIT
// Python array -> TensorView, by DLPack. torch (2.10 and later) offers a C function table on the tensor's type, which
// costs a fraction of a microsecond a tensor; numpy's arrays of the commonest types are read as they are, also
// those that must not be written to (do not pass one as an output: nobody checks); any other library goes through the
// __dlpack__() method.
#pragma once

#include <pybind11/pybind11.h>

#include "namedmask/tensor_view.h"

namespace namedmask::bindings {

// Fills `view` and returns the object that must stay alive while the view is in use.
// Throws TypeError where `array` speaks no DLPack, has no memory (a FakeTensor) or a dtype the library does not know.
pybind11::object read_dlpack(pybind11::handle array, TensorView& view);

}  // namespace namedmask::bindings

namespace pybind11::detail {

// Lets a bound function take `const TensorView&` and be called with any array that speaks DLPack.
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

// Lets a bound function take a Stream and be called with torch.cuda.current_stream().cuda_stream, an int.
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
