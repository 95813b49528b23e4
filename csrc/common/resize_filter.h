// SPDX-License-Identifier: MIT
// The taps of a pixel of a resized row or column, and the argument checks, shared by the CPU and CUDA versions of
// resize.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "namedmask/resize.h"
#include "namedmask/tensor_view.h"

namespace namedmask {

struct Taps {
  int32_t first, count;  // of the input
  double center, scale;  // of the filter, and how much wider than the interpolation it is, at least 1
};

NMK_HOST_DEVICE inline double half_width(Interpolation interpolation) {
  return interpolation == Interpolation::kBilinear ? 1 : 2;
}

// The taps of pixel i of `to`, in an image with `from` pixels along this axis; one of weight 1 if it keeps its length.
NMK_HOST_DEVICE inline Taps taps_of(int64_t i, int64_t from, int64_t to, Interpolation interpolation) {
  if (from == to) return {static_cast<int32_t>(i), 1, static_cast<double>(i) + 0.5, 1};
  const double step = static_cast<double>(from) / static_cast<double>(to), scale = step > 1 ? step : 1;
  const double center = step * (static_cast<double>(i) + 0.5), reach = half_width(interpolation) * scale;
  const auto first = static_cast<int64_t>(center - reach + 0.5), end = static_cast<int64_t>(center + reach + 0.5);
  const int64_t begin = center - reach + 0.5 < 0 ? 0 : first;
  return {static_cast<int32_t>(begin), static_cast<int32_t>((end < from ? end : from) - begin), center, scale};
}

// The weight of tap k, before the weights are scaled to sum to 1.
NMK_HOST_DEVICE inline double weight_of(const Taps& taps, int32_t k, Interpolation interpolation) {
  double x = (static_cast<double>(taps.first + k) + 0.5 - taps.center) / taps.scale;
  x = x < 0 ? -x : x;
  if (interpolation == Interpolation::kBilinear) return x < 1 ? 1 - x : 0;
  constexpr double kA = -0.5;
  if (x < 1) return ((kA + 2) * x - (kA + 3)) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * kA - 4 * kA : 0;
}

// The arguments of resize after their checks.
struct ResizeBatch {
  RaggedShape from, to;  // images, and the grids of the output: pixels or patches
  const int32_t* sizes;  // of the new images, [B, 2]
  int64_t channels;
  bool normalizes;  // by the levels

  int32_t height(int64_t b) const { return sizes[2 * b]; }
  int32_t width(int64_t b) const { return sizes[2 * b + 1]; }
};

// Throws std::invalid_argument.
inline ResizeBatch expect_resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes,
                                 const TensorView& out, const TensorView& new_offsets, const TensorView& new_shapes,
                                 const TensorView& sizes, const TensorView& levels, int64_t patch, Device device) {
  const char* op = "resize";
  const bool is_bytes = image.dtype == DType::kUInt8, normalizes = levels.ndim > 0 && levels.shape[0] > 0;
  expect(op, "image", image, is_bytes || normalizes ? DType::kUInt8 : DType::kFloat32, {-1, -1}, device);
  const int64_t channels = image.shape[1];
  const bool known = out.dtype == DType::kFloat16 || out.dtype == DType::kBFloat16;
  const DType normalized = known ? out.dtype : DType::kFloat32;
  if (patch < 1 || (patch > 1 && !normalizes)) throw std::invalid_argument("resize: patches require levels");
  expect(op, "out", out, normalizes ? normalized : image.dtype, {-1, channels * patch * patch}, device);
  expect(op, "levels", levels, out.dtype, {normalizes ? channels : 0, 256}, device);
  const ResizeBatch batch = {expect_ragged(op, offsets, shapes, image.shape[0]),
                             expect_ragged(op, new_offsets, new_shapes, out.shape[0]), sizes.as<int32_t>(), channels,
                             normalizes};
  expect(op, "sizes", sizes, DType::kInt32, {batch.from.count, 2});
  if (batch.from.count != batch.to.count) throw std::invalid_argument("resize: there must be one size per image");
  for (int64_t b = 0; b < batch.from.count; ++b) {
    const int64_t h = batch.height(b), w = batch.width(b);
    if (batch.to.height(b) != (h + patch - 1) / patch || batch.to.width(b) != (w + patch - 1) / patch) {
      throw std::invalid_argument("resize: the output of image " + std::to_string(b) + " does not have its new size");
    }
    if ((batch.from.begin(b) == batch.from.end(b)) != (batch.to.begin(b) == batch.to.end(b))) {
      throw std::invalid_argument("resize: image " + std::to_string(b) +
                                  " and its new size must both have pixels, or neither");
    }
  }
  return batch;
}

}  // namespace namedmask
