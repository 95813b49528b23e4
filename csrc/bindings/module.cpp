// SPDX-License-Identifier: MIT
// namedmask_kernels._native: the C++ operators for Python. Functions take arrays that support DLPack and fill outputs
// that Python has allocated where their size is known. A wrong array raises ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "cuda_module.h"
#include "define.h"
#include "level.h"
#include "namedmask/attention_features.h"
#include "namedmask/bilateral_solver.h"
#include "namedmask/connected_components.h"
#include "namedmask/dense_crf.h"
#include "namedmask/normalized_cut.h"
#include "namedmask/pamr.h"
#include "namedmask/random_walk.h"
#include "namedmask/resize.h"
#include "namedmask/run_lengths.h"
#include "namedmask/spectral_clusters.h"
#include "namedmask/vote_masks.h"
#include "threads.h"

namespace py = pybind11;

namespace {

// The values of an array of a size that only the operator knows.
template <class T>
struct Values {
  std::vector<T> values;
};

// A numpy array that owns the values.
template <class T>
py::array_t<T> array_of(std::vector<T> values, std::vector<ssize_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(std::move(shape), owned->data(), owner);
}

}  // namespace

// These convert results when the GIL is held again.
namespace pybind11::detail {

template <class T>
struct type_caster<Values<T>> {
  static constexpr auto name = const_name("numpy.ndarray");

  static handle cast(Values<T>&& values, return_value_policy, handle) {
    const auto n = static_cast<ssize_t>(values.values.size());
    return array_of(std::move(values.values), {n}).release();
  }
};

template <>
struct type_caster<namedmask::ComponentStats> {
  static constexpr auto name = const_name("tuple[numpy.ndarray, numpy.ndarray]");

  static handle cast(namedmask::ComponentStats&& stats, return_value_policy, handle) {
    const auto n = static_cast<ssize_t>(stats.areas.size());
    return make_tuple(array_of(std::move(stats.areas), {n}), array_of(std::move(stats.boxes), {n, 4})).release();
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using namedmask::Interpolation;
  using namedmask::TensorView;
  using namedmask::bindings::define;
  using namedmask::bindings::kBilateralFields, namedmask::bindings::kCrfFields, namedmask::bindings::kCutFields;
  namespace cpu = namedmask::cpu;

  m.def("thread_count", &cpu::thread_count);
  m.def("limit_threads", &cpu::limit_threads);
  m.def("level", [] { return cpu::name(cpu::level()); });  // a name of csrc/cpu/level.h
#ifdef NMK_WITH_CUDA
  m.def("has_cuda", [] { return true; });
  namedmask::bindings::define_cuda(m.def_submodule("cuda"));
#else
  m.def("has_cuda", [] { return false; });  // built without CUDA kernels
#endif

  define(m, "attention_features", &cpu::attention_features);
  define(m, "bilateral_solver", &cpu::bilateral_solver, kBilateralFields);
  define(m, "connected_components", &cpu::connected_components);
  define(m, "largest_component", &cpu::largest_component);
  define(m, "fill_holes", &cpu::fill_holes);
  define(m, "dense_crf", &cpu::dense_crf, kCrfFields);
  define(m, "normalized_cut", &cpu::normalized_cut, kCutFields);
  define(m, "pamr", &cpu::pamr);
  define(m, "random_walk", &cpu::random_walk);
  define(m, "resize",
         [](const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, int64_t interpolation, int64_t patch) {
           cpu::resize(image, offsets, shapes, out, new_offsets, new_shapes, sizes, levels,
                       Interpolation(interpolation), patch);
         });
  define(m, "run_lengths",
         [](const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& first) {
           return Values<int32_t>{cpu::run_lengths(mask, offsets, shapes, first)};
         });
  define(m, "compress_runs",
         [](const TensorView& lengths, const TensorView& first, const TensorView& shapes, const TensorView& areas,
            const TensorView& boxes, const TensorView& ends) {
           return Values<uint8_t>{cpu::compress_runs(lengths, first, shapes, areas, boxes, ends)};
         });
  define(m, "spectral_clusters", &cpu::spectral_clusters);
  define(m, "vote_masks", &cpu::vote_masks);
}
