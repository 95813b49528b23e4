// SPDX-License-Identifier: MIT
#include "cuda_module.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "define.h"
#include "namedmask/bilateral_solver.h"
#include "namedmask/connected_components.h"
#include "namedmask/dense_crf.h"
#include "namedmask/normalized_cut.h"
#include "namedmask/resize.h"
#include "namedmask/run_lengths.h"
#include "namedmask/spectral_clusters.h"
#include "namedmask/vote_masks.h"

namespace namedmask::bindings {

void define_cuda(pybind11::module_ m) {
  define(m, "bilateral_solver",
         [](const TensorView& target, const TensorView& image, const TensorView& confidences, const TensorView& offsets,
            const TensorView& shapes, const TensorView& out, const TensorView& workspace, double confidence,
            std::vector<double> sigma_spatial, double sigma_luma, double sigma_chroma, double smoothness,
            int64_t iterations, double tolerance, Stream stream) {
           cuda::bilateral_solver(
               target, image, confidences, offsets, shapes, out, workspace,
               {confidence, {std::move(sigma_spatial)}, sigma_luma, sigma_chroma, smoothness, iterations, tolerance},
               stream);
         });
  define(m, "connected_components", &cuda::connected_components);
  define(m, "component_stats", &cuda::component_stats);
  define(m, "largest_component", &cuda::largest_component);
  define(m, "fill_holes", &cuda::fill_holes);
  define(m, "seeded_component", &cuda::seeded_component);
  define(m, "dense_crf_lattice",
         [](const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
            const TensorView& shapes, const TensorView& out, const TensorView& status, const TensorView& workspace,
            int64_t iterations, std::vector<double> gaussian_sigma, double gaussian_weight,
            std::vector<double> bilateral_sigma, double bilateral_sigma_rgb, double bilateral_weight, Stream stream) {
           cuda::dense_crf_lattice(probabilities, image, offsets, shapes, out, status, workspace,
                                   {iterations,
                                    {std::move(gaussian_sigma)},
                                    gaussian_weight,
                                    {std::move(bilateral_sigma)},
                                    bilateral_sigma_rgb,
                                    bilateral_weight},
                                   stream);
         });
  define(m, "dense_crf_workspace",
         [](const TensorView& offsets, const TensorView& shapes, const TensorView& counts, int64_t labels,
            int64_t iterations, std::vector<double> gaussian_sigma, double gaussian_weight,
            std::vector<double> bilateral_sigma, double bilateral_sigma_rgb, double bilateral_weight) {
           return cuda::dense_crf_workspace(offsets, shapes, counts, labels,
                                            {iterations,
                                             {std::move(gaussian_sigma)},
                                             gaussian_weight,
                                             {std::move(bilateral_sigma)},
                                             bilateral_sigma_rgb,
                                             bilateral_weight});
         });
  define(m, "dense_crf",
         [](const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& counts,
            const TensorView& lattice_workspace, const TensorView& workspace, int64_t iterations,
            std::vector<double> gaussian_sigma, double gaussian_weight, std::vector<double> bilateral_sigma,
            double bilateral_sigma_rgb, double bilateral_weight, Stream stream) {
           cuda::dense_crf(offsets, shapes, out, counts, lattice_workspace, workspace,
                           {iterations,
                            {std::move(gaussian_sigma)},
                            gaussian_weight,
                            {std::move(bilateral_sigma)},
                            bilateral_sigma_rgb,
                            bilateral_weight},
                           stream);
         });
  define(m, "normalized_cut", &cuda::normalized_cut);
  define(m, "resize",
         [](const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, int64_t interpolation, int64_t patch, Stream stream) {
           cuda::resize(image, offsets, shapes, out, new_offsets, new_shapes, sizes, levels,
                        Interpolation(interpolation), patch, stream);
         });
  define(m, "run_counts", &cuda::run_counts);
  define(m, "run_lengths", &cuda::run_lengths);
  define(m, "spectral_clusters_workspace", &cuda::spectral_clusters_workspace);
  define(m, "spectral_clusters", &cuda::spectral_clusters);
  define(m, "vote_masks", &cuda::vote_masks);
}

}  // namespace namedmask::bindings
