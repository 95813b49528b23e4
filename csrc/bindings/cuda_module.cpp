// SPDX-License-Identifier: MIT
#include "cuda_module.h"

#include "dlpack_reader.h"
#include "namedmask/bilateral_solver.h"
#include "namedmask/connected_components.h"
#include "namedmask/dense_crf.h"
#include "namedmask/normalized_cut.h"
#include "namedmask/spectral_clusters.h"

namespace py = pybind11;

namespace namedmask::bindings {

void define_cuda(py::module_ m) {
  using py::arg;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "bilateral_solver",
      [](const TensorView& target, const TensorView& image, const TensorView& offsets, const TensorView& shapes,
         const TensorView& out, const TensorView& workspace, double confidence, double sigma_spatial, double sigma_luma,
         double sigma_chroma, double smoothness, int64_t iterations, double tolerance, Stream stream) {
        cuda::bilateral_solver(target, image, offsets, shapes, out, workspace,
                               {confidence, sigma_spatial, sigma_luma, sigma_chroma, smoothness, iterations, tolerance},
                               stream);
      },
      arg("target"), arg("image"), arg("offsets"), arg("shapes"), arg("out"), arg("workspace"), arg("confidence"),
      arg("sigma_spatial"), arg("sigma_luma"), arg("sigma_chroma"), arg("smoothness"), arg("iterations"),
      arg("tolerance"), arg("stream"), release());
  m.def("connected_components", &cuda::connected_components, arg("mask"), arg("offsets"), arg("shapes"), arg("labels"),
        arg("counts"), arg("workspace"), arg("stream"), release());
  m.def("component_stats", &cuda::component_stats, arg("labels"), arg("offsets"), arg("shapes"), arg("counts"),
        arg("areas"), arg("boxes"), arg("stream"), release());
  m.def(
      "dense_crf_lattice",
      [](const TensorView& probabilities, const TensorView& image, const TensorView& offsets, const TensorView& shapes,
         const TensorView& out, const TensorView& status, const TensorView& workspace, int64_t iterations,
         double gaussian_sigma, double gaussian_weight, double bilateral_sigma, double bilateral_sigma_rgb,
         double bilateral_weight, Stream stream) {
        cuda::dense_crf_lattice(
            probabilities, image, offsets, shapes, out, status, workspace,
            {iterations, gaussian_sigma, gaussian_weight, bilateral_sigma, bilateral_sigma_rgb, bilateral_weight},
            stream);
      },
      arg("probabilities"), arg("image"), arg("offsets"), arg("shapes"), arg("out"), arg("status"), arg("workspace"),
      arg("iterations"), arg("gaussian_sigma"), arg("gaussian_weight"), arg("bilateral_sigma"),
      arg("bilateral_sigma_rgb"), arg("bilateral_weight"), arg("stream"), release());
  m.def(
      "dense_crf_workspace",
      [](const TensorView& offsets, const TensorView& shapes, const TensorView& counts, int64_t labels,
         int64_t iterations, double gaussian_sigma, double gaussian_weight, double bilateral_sigma,
         double bilateral_sigma_rgb, double bilateral_weight) {
        return cuda::dense_crf_workspace(
            offsets, shapes, counts, labels,
            {iterations, gaussian_sigma, gaussian_weight, bilateral_sigma, bilateral_sigma_rgb, bilateral_weight});
      },
      arg("offsets"), arg("shapes"), arg("counts"), arg("labels"), arg("iterations"), arg("gaussian_sigma"),
      arg("gaussian_weight"), arg("bilateral_sigma"), arg("bilateral_sigma_rgb"), arg("bilateral_weight"), release());
  m.def(
      "dense_crf",
      [](const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& status,
         const TensorView& counts, const TensorView& lattice_workspace, const TensorView& workspace, int64_t iterations,
         double gaussian_sigma, double gaussian_weight, double bilateral_sigma, double bilateral_sigma_rgb,
         double bilateral_weight, Stream stream) {
        cuda::dense_crf(
            offsets, shapes, out, status, counts, lattice_workspace, workspace,
            {iterations, gaussian_sigma, gaussian_weight, bilateral_sigma, bilateral_sigma_rgb, bilateral_weight},
            stream);
      },
      arg("offsets"), arg("shapes"), arg("out"), arg("status"), arg("counts"), arg("lattice_workspace"),
      arg("workspace"), arg("iterations"), arg("gaussian_sigma"), arg("gaussian_weight"), arg("bilateral_sigma"),
      arg("bilateral_sigma_rgb"), arg("bilateral_weight"), arg("stream"), release());
  m.def("largest_component", &cuda::largest_component, arg("mask"), arg("offsets"), arg("shapes"), arg("out"),
        arg("workspace"), arg("stream"), release());
  m.def("fill_holes", &cuda::fill_holes, arg("mask"), arg("offsets"), arg("shapes"), arg("out"), arg("workspace"),
        arg("stream"), release());
  m.def("normalized_cut", &cuda::normalized_cut, arg("bits"), arg("offsets"), arg("shapes"), arg("vector"),
        arg("value"), arg("residual"), arg("iterations"), arg("partition"), arg("seed"), arg("workspace"), arg("eps"),
        arg("tolerance"), arg("max_iterations"), arg("stream"), release());
  m.def("spectral_clusters_workspace", &cuda::spectral_clusters_workspace, arg("offsets"), arg("shapes"), arg("counts"),
        arg("tokens"), arg("channels"));
  m.def("spectral_clusters", &cuda::spectral_clusters, arg("unit"), arg("ranges"), arg("offsets"), arg("shapes"),
        arg("counts"), arg("labels"), arg("workspace"), arg("seed"), arg("stream"), release());
}

}  // namespace namedmask::bindings
