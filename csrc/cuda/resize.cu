// SPDX-License-Identifier: MIT
// A thread computes a pixel of the output, all channels, from the pixels below the filter; neighboring threads share
// most of them through the L1 cache.
#include "images.h"
#include "namedmask/resize.h"
#include "resize_filter.h"

namespace namedmask::cuda {
namespace {

constexpr int kChannels = 4;   // that a thread sums at once
constexpr int kThreads = 256;  // for kChunk pixels: a thread takes 72 registers, too many for a block of 1,024

// The output's grids are the ones that blocks are mapped to; these are the inputs, and the outputs' sizes in pixels.
struct Sizes {
  int32_t begin[kMaxImages] = {}, height[kMaxImages] = {}, width[kMaxImages] = {};
  int32_t new_height[kMaxImages] = {}, new_width[kMaxImages] = {};
};

template <class T>
__device__ float rounded(float value) {
  return value;
}
template <>
__device__ float rounded<uint8_t>(float value) {
  return floorf(fminf(fmaxf(value, 0.0f), 255.0f) + 0.5f);
}

// The elements of the output: resized values themselves, or levels, whose 2 or 4 bytes are copied.
template <class T>
struct Values {
  using Type = T;
  __device__ T operator()(float value, int32_t) const { return static_cast<T>(value); }
};
template <class T>
struct Levels {
  using Type = T;
  const T* levels;
  __device__ T operator()(float value, int32_t channel) const {
    return levels[channel * 256 + static_cast<int32_t>(value)];
  }
};

__device__ float weight_sum(const Taps& taps, Interpolation interpolation) {
  float sum = 0;
  for (int32_t k = 0; k < taps.count; ++k) sum += static_cast<float>(weight_of(taps, k, interpolation));
  return sum;
}

// Computes a pixel of the patches; pixels are in the raster order of the image.
template <class T, class Elements>
__device__ void resize_pixel(int64_t pixel, const Image& image, int place, const Sizes& sizes, int32_t channels,
                             int32_t patch, Interpolation interpolation, Elements elements, const T* all,
                             typename Elements::Type* out) {
  const int64_t row_length = int64_t{image.width} * patch;
  if (pixel >= row_length * image.height * patch) return;
  const auto y = static_cast<int32_t>(pixel / row_length), x = static_cast<int32_t>(pixel % row_length);
  const int64_t area = int64_t{patch} * patch, cell = image.begin + int64_t{y / patch} * image.width + x / patch;
  typename Elements::Type* const target = out + cell * channels * area + (y % patch) * patch + x % patch;
  const int32_t new_height = sizes.new_height[place], new_width = sizes.new_width[place];
  if (y >= new_height || x >= new_width) {
    for (int32_t c = 0; c < channels; ++c) target[c * area] = 0;
    return;
  }
  const int32_t width = sizes.width[place];
  const Taps rows = taps_of(y, sizes.height[place], new_height, interpolation);
  const Taps columns = taps_of(x, width, new_width, interpolation);
  const float row_norm = 1 / weight_sum(rows, interpolation), column_norm = 1 / weight_sum(columns, interpolation);
  const T* source = all + static_cast<int64_t>(sizes.begin[place]) * channels;
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
    for (int32_t c = 0; c < count; ++c) target[(first + c) * area] = elements(rounded<T>(sums[c]), first + c);
  }
}

template <class T, class Elements>
__global__ void __launch_bounds__(kThreads, 3)
    resize_images(const __grid_constant__ Images images, const __grid_constant__ Sizes sizes, int32_t channels,
                  int32_t patch, Interpolation interpolation, Elements elements, const T* all,
                  typename Elements::Type* out) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  for (int32_t i = threadIdx.x; i < kChunk; i += kThreads) {
    const int64_t pixel = int64_t{image.block} * kChunk + i;
    resize_pixel(pixel, image, place, sizes, channels, patch, interpolation, elements, all, out);
  }
}

template <class T, class Elements>
void run(const TensorView& image, const ResizeBatch& batch, const TensorView& out, Elements elements,
         Interpolation interpolation, int64_t patch, Stream stream) {
  for_each_group(
      batch.to,
      [&](const Images& images, int64_t chunks) {
        Sizes sizes;
        for (int32_t i = 0; i < images.count; ++i) {
          const int64_t b = images.first + i;
          sizes.begin[i] = static_cast<int32_t>(batch.from.begin(b));
          sizes.height[i] = static_cast<int32_t>(batch.from.height(b));
          sizes.width[i] = static_cast<int32_t>(batch.from.width(b));
          sizes.new_height[i] = batch.height(b);
          sizes.new_width[i] = batch.width(b);
        }
        launch(resize_images<T, Elements>, chunks, kThreads, stream, images, sizes,
               static_cast<int32_t>(batch.channels), static_cast<int32_t>(patch), interpolation, elements,
               image.as<T>(), out.as<typename Elements::Type>());
      },
      patch * patch);
}

}  // namespace

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, Interpolation interpolation, int64_t patch, Stream stream) {
  const ResizeBatch batch =
      expect_resize(image, offsets, shapes, out, new_offsets, new_shapes, sizes, levels, patch, Device::kCUDA);
  const OnDevice device(image);
  if (!batch.normalizes) {
    if (image.dtype == DType::kUInt8)
      return run<uint8_t>(image, batch, out, Values<uint8_t>{}, interpolation, patch, stream);
    return run<float>(image, batch, out, Values<float>{}, interpolation, patch, stream);
  }
  if (levels.element_size() == 2) {
    return run<uint8_t>(image, batch, out, Levels<uint16_t>{levels.as<uint16_t>()}, interpolation, patch, stream);
  }
  run<uint8_t>(image, batch, out, Levels<uint32_t>{levels.as<uint32_t>()}, interpolation, patch, stream);
}

}  // namespace namedmask::cuda
