// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "dlpack_reader.h"
#include "namedmask/bilateral_solver.h"
#include "namedmask/dense_crf.h"
#include "namedmask/normalized_cut.h"

namespace namedmask::bindings {

// Binds a function of TensorViews, numbers and a Stream. Python passes the arguments by position; the GIL is released
// during the call. std::invalid_argument becomes ValueError.
template <class F>
void define(pybind11::module_& m, const char* name, F function) {
  m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
}

// The types of the fields of a struct of settings, in their order.
template <class Settings, class... Types>
struct Fields {};

constexpr Fields<BilateralSettings, double, PerImage, double, double, double, int64_t, double> kBilateralFields;
constexpr Fields<CrfSettings, int64_t, PerImage, double, PerImage, double, double> kCrfFields;
constexpr Fields<CutSettings, double, double, double, int64_t> kCutFields;

template <class... Types>
struct Parameters {};

template <class F, class Settings, class... Types, class... Before, class... After>
void define(pybind11::module_& m, const char* name, F function, Fields<Settings, Types...>, Parameters<Before...>,
            Parameters<const Settings&, After...>) {
  define(m, name, [function](Before... before, Types... fields, After... after) {
    return function(before..., Settings{std::move(fields)...}, after...);
  });
}

template <class F, class Settings, class... Types, class... Before, class Next, class... After>
void define(pybind11::module_& m, const char* name, F function, Fields<Settings, Types...> fields,
            Parameters<Before...>, Parameters<Next, After...>) {
  define(m, name, function, fields, Parameters<Before..., Next>(), Parameters<After...>());
}

// Binds a function with a parameter `const Settings&`, in whose place Python passes the fields.
template <class Settings, class... Types, class R, class... All>
void define(pybind11::module_& m, const char* name, R (*function)(All...), Fields<Settings, Types...> fields) {
  define(m, name, function, fields, Parameters<>(), Parameters<All...>());
}

}  // namespace namedmask::bindings

namespace pybind11::detail {

// A setting for all images or for each is a list of floats.
template <>
struct type_caster<namedmask::PerImage> {
  PYBIND11_TYPE_CASTER(namedmask::PerImage, const_name("list[float]"));

  bool load(handle source, bool convert) {
    make_caster<std::vector<double>> values;
    if (!values.load(source, convert)) return false;
    value.values = cast_op<std::vector<double>&&>(std::move(values));
    return true;
  }
};

}  // namespace pybind11::detail
