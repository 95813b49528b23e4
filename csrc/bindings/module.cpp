// SPDX-License-Identifier: MIT
// namedmask_kernels._native: the C++ operators as Python sees them. Every function takes arrays that speak DLPack,
// outputs included (the Python side allocates those whose size it knows), releases the GIL and raises ValueError for a
// wrong array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "cuda_module.h"
#include "dlpack_reader.h"
#include "level.h"
#include "namedmask/attention_features.h"
#include "namedmask/bilateral_solver.h"
#include "namedmask/connected_components.h"
#include "namedmask/dense_crf.h"
#include "namedmask/normalized_cut.h"
#include "namedmask/pamr.h"
#include "namedmask/random_walk.h"
#include "namedmask/spectral_clusters.h"
#include "namedmask/vote_masks.h"

namespace py = pybind11;

namespace {

// A numpy array of the shape, which owns the values.
py::array_t<int32_t> array_of(std::vector<int32_t> values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<int32_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
  return py::array_t<int32_t>(std::move(shape), owned->data(), owner);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;
  namespace cpu = namedmask::cpu;

  m.def("level", [] { return cpu::name(cpu::level()); });  // "portable", "avx2", "avx512" or "avx512_vnni"
#ifdef NMK_WITH_CUDA
  m.def("has_cuda", [] { return true; });
  namedmask::bindings::define_cuda(m.def_submodule("cuda"));
#else
  m.def("has_cuda", [] { return false; });  // this build has no CUDA kernels
#endif

  m.def(
      "attention_features",
      [](const namedmask::TensorView& qkv, const namedmask::TensorView& offsets, const namedmask::TensorView& taps,
         double scale, const std::optional<namedmask::TensorView>& output,
         const std::optional<namedmask::TensorView>& rows, const std::optional<namedmask::TensorView>& lse,
         const std::optional<namedmask::TensorView>& key_norms) {
        const auto pointer = [](const auto& view) { return view ? &*view : nullptr; };
        cpu::attention_features(qkv, offsets, taps, scale, pointer(output), pointer(rows), pointer(lse),
                                pointer(key_norms));
      },
      arg("qkv"), arg("offsets"), arg("taps"), arg("scale"), arg("output"), arg("rows"), arg("lse"), arg("key_norms"),
      release());
  m.def(
      "bilateral_solver",
      [](const namedmask::TensorView& target, const namedmask::TensorView& image, const namedmask::TensorView& offsets,
         const namedmask::TensorView& shapes, const namedmask::TensorView& out, double confidence, double sigma_spatial,
         double sigma_luma, double sigma_chroma, double smoothness, int64_t iterations, double tolerance) {
        cpu::bilateral_solver(target, image, offsets, shapes, out,
                              {confidence, sigma_spatial, sigma_luma, sigma_chroma, smoothness, iterations, tolerance});
      },
      arg("target"), arg("image"), arg("offsets"), arg("shapes"), arg("out"), arg("confidence"), arg("sigma_spatial"),
      arg("sigma_luma"), arg("sigma_chroma"), arg("smoothness"), arg("iterations"), arg("tolerance"), release());
  m.def(
      "connected_components",
      [](const namedmask::TensorView& mask, const namedmask::TensorView& offsets, const namedmask::TensorView& shapes,
         const namedmask::TensorView& labels, const namedmask::TensorView& first) {
        namedmask::ComponentStats stats;
        {
          py::gil_scoped_release released;
          stats = cpu::connected_components(mask, offsets, shapes, labels, first);
        }
        const auto n = static_cast<py::ssize_t>(stats.areas.size());
        return py::make_tuple(array_of(std::move(stats.areas), {n}), array_of(std::move(stats.boxes), {n, 4}));
      },
      arg("mask"), arg("offsets"), arg("shapes"), arg("labels"), arg("first"));
  m.def("largest_component", &cpu::largest_component, arg("mask"), arg("offsets"), arg("shapes"), arg("out"),
        release());
  m.def(
      "dense_crf",
      [](const namedmask::TensorView& probabilities, const namedmask::TensorView& image,
         const namedmask::TensorView& offsets, const namedmask::TensorView& shapes, const namedmask::TensorView& out,
         int64_t iterations, double gaussian_sigma, double gaussian_weight, double bilateral_sigma,
         double bilateral_sigma_rgb, double bilateral_weight) {
        cpu::dense_crf(
            probabilities, image, offsets, shapes, out,
            {iterations, gaussian_sigma, gaussian_weight, bilateral_sigma, bilateral_sigma_rgb, bilateral_weight});
      },
      arg("probabilities"), arg("image"), arg("offsets"), arg("shapes"), arg("out"), arg("iterations"),
      arg("gaussian_sigma"), arg("gaussian_weight"), arg("bilateral_sigma"), arg("bilateral_sigma_rgb"),
      arg("bilateral_weight"), release());
  m.def("fill_holes", &cpu::fill_holes, arg("mask"), arg("offsets"), arg("shapes"), arg("out"), release());
  m.def(
      "normalized_cut",
      [](const namedmask::TensorView& features, const namedmask::TensorView& offsets,
         const namedmask::TensorView& shapes, const namedmask::TensorView& vector, const namedmask::TensorView& value,
         const namedmask::TensorView& residual, const namedmask::TensorView& iterations,
         const namedmask::TensorView& partition, const namedmask::TensorView& seed,
         const namedmask::TensorView& foreground, double tau, double eps, double tolerance, int64_t max_iterations) {
        cpu::normalized_cut(features, offsets, shapes, vector, value, residual, iterations, partition, seed, foreground,
                            {tau, eps, tolerance, max_iterations});
      },
      arg("features"), arg("offsets"), arg("shapes"), arg("vector"), arg("value"), arg("residual"), arg("iterations"),
      arg("partition"), arg("seed"), arg("foreground"), arg("tau"), arg("eps"), arg("tolerance"), arg("max_iterations"),
      release());
  m.def("pamr", &cpu::pamr, arg("masks"), arg("image"), arg("offsets"), arg("shapes"), arg("out"), arg("dilations"),
        arg("iterations"), release());
  m.def("random_walk", &cpu::random_walk, arg("masks"), arg("features"), arg("offsets"), arg("shapes"), arg("out"),
        arg("steps"), arg("sharpness"), release());
  m.def("spectral_clusters", &cpu::spectral_clusters, arg("features"), arg("offsets"), arg("shapes"), arg("counts"),
        arg("labels"), arg("seed"), release());
  m.def("vote_masks", &cpu::vote_masks, arg("masks"), arg("offsets"), arg("shapes"), arg("winner"), arg("kept"),
        arg("reasons"), arg("scores"), release());
}
