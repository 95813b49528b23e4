// SPDX-License-Identifier: MIT
// A thread computes a pixel of the output, all channels, from the pixels below the filter; neighboring threads share
// most of them through the L1 cache.
#include "images.h"
#include "namedmask/resize.h"
#include "resize_filter.h"

namespace namedmask::cuda {
namespace {

constexpr int kChannels = 4;  // that a thread sums at once

// The output's images are the ones that blocks are mapped to; these are the inputs.
struct Sources {
  int32_t begin[kMaxImages] = {}, height[kMaxImages] = {}, width[kMaxImages] = {};
};

template <class T>
__device__ float rounded(float value) {
  return value;
}
template <>
__device__ float rounded<uint8_t>(float value) {
  return floorf(fminf(fmaxf(value, 0.0f), 255.0f) + 0.5f);
}

__device__ float weight_sum(const Taps& taps, Interpolation interpolation) {
  float sum = 0;
  for (int32_t k = 0; k < taps.count; ++k) sum += static_cast<float>(weight_of(taps, k, interpolation));
  return sum;
}

template <class T>
__global__ void resize_images(const __grid_constant__ Images images, const __grid_constant__ Sources sources,
                              int32_t channels, Interpolation interpolation, const T* all, T* out) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const int32_t width = sources.width[place];
  const Taps rows = taps_of(pixel / image.width, sources.height[place], image.height, interpolation);
  const Taps columns = taps_of(pixel % image.width, width, image.width, interpolation);
  const float row_norm = 1 / weight_sum(rows, interpolation), column_norm = 1 / weight_sum(columns, interpolation);
  const T* source = all + static_cast<int64_t>(sources.begin[place]) * channels;
  for (int32_t first = 0; first < channels; first += kChannels) {
    const int32_t count = min(channels - first, kChannels);
    float sums[kChannels] = {};
    for (int32_t j = 0; j < rows.count; ++j) {
      const int64_t row = static_cast<int64_t>(rows.first + j) * width + columns.first;
      float of_row[kChannels] = {};
      for (int32_t k = 0; k < columns.count; ++k) {
        const float weight = static_cast<float>(weight_of(columns, k, interpolation)) * column_norm;
        const T* values = source + (row + k) * channels + first;
        for (int32_t c = 0; c < count; ++c) of_row[c] += weight * static_cast<float>(values[c]);
      }
      const float weight = static_cast<float>(weight_of(rows, j, interpolation)) * row_norm;
      for (int32_t c = 0; c < count; ++c) sums[c] += weight * rounded<T>(of_row[c]);
    }
    T* const target = out + (static_cast<int64_t>(image.begin) + pixel) * channels + first;
    for (int32_t c = 0; c < count; ++c) target[c] = static_cast<T>(rounded<T>(sums[c]));
  }
}

}  // namespace

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, Interpolation interpolation, Stream stream) {
  const char* op = "resize";
  const bool is_bytes = image.dtype == DType::kUInt8;
  expect(op, "image", image, is_bytes ? DType::kUInt8 : DType::kFloat32, {-1, -1}, Device::kCUDA);
  const RaggedShape from = expect_ragged(op, offsets, shapes, image.shape[0]);
  expect(op, "out", out, image.dtype, {-1, image.shape[1]}, Device::kCUDA);
  const RaggedShape to = expect_ragged(op, new_offsets, new_shapes, out.shape[0]);
  expect_sizes(from, to);
  const OnDevice device(image);
  const auto channels = static_cast<int32_t>(image.shape[1]);
  for_each_group(to, [&](const Images& images, int64_t chunks) {
    Sources sources;
    for (int32_t i = 0; i < images.count; ++i) {
      const int64_t b = images.first + i;
      sources.begin[i] = static_cast<int32_t>(from.begin(b));
      sources.height[i] = static_cast<int32_t>(from.height(b));
      sources.width[i] = static_cast<int32_t>(from.width(b));
    }
    if (is_bytes) {
      launch(resize_images<uint8_t>, chunks, kChunk, stream, images, sources, channels, interpolation,
             image.as<uint8_t>(), out.as<uint8_t>());
    } else {
      launch(resize_images<float>, chunks, kChunk, stream, images, sources, channels, interpolation, image.as<float>(),
             out.as<float>());
    }
  });
}

}  // namespace namedmask::cuda
