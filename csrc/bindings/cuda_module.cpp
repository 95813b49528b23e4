// SPDX-License-Identifier: MIT
#include "cuda_module.h"

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
  define(m, "bilateral_solver", &cuda::bilateral_solver, kBilateralFields);
  define(m, "connected_components", &cuda::connected_components);
  define(m, "component_stats", &cuda::component_stats);
  define(m, "largest_component", &cuda::largest_component);
  define(m, "fill_holes", &cuda::fill_holes);
  define(m, "seeded_component", &cuda::seeded_component);
  define(m, "dense_crf_lattice", &cuda::dense_crf_lattice, kCrfFields);
  define(m, "dense_crf_workspace", &cuda::dense_crf_workspace, kCrfFields);
  define(m, "dense_crf", &cuda::dense_crf, kCrfFields);
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
