// SPDX-License-Identifier: MIT
// Resizes the rows, then the columns, a whole row at a time. Of uint8 images the resized rows are rounded and clamped
// to uint8, as in Pillow and torch. resize_kernel.h has the loops.
#include "namedmask/resize.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "for_each_image.h"
#include "resize_filter.h"
#include "resize_levels.h"

namespace namedmask::cpu {
namespace {

const ResizeKernels& kernels() { return NMK_BEST(resize); }

// The taps of all pixels of an axis, `count` for each.
struct AxisTaps {
  int64_t count = 0;
  Buffer<int32_t> first;
  Buffer<float> weights;

  void compute(int64_t from, int64_t to, Interpolation interpolation) {
    count = 0;
    for (int64_t i = 0; i < to; ++i) {
      count = std::max<int64_t>(count, taps_of(i, from, to, interpolation).count);
    }
    first.reserve(to);
    weights.reserve(to * count);
    for (int64_t i = 0; i < to; ++i) {
      Taps taps = taps_of(i, from, to, interpolation);
      double sum = 0;
      for (int32_t k = 0; k < taps.count; ++k) sum += weight_of(taps, k, interpolation);
      // Pixels near the end have fewer taps: with weights of 0 before them, no pixel beyond the end is read.
      const int32_t before =
          std::max<int32_t>(0, taps.first + static_cast<int32_t>(count) - static_cast<int32_t>(from));
      first[i] = taps.first - before;
      float* const weight = weights.data() + i * count;
      std::fill_n(weight, count, 0.0f);
      for (int32_t k = 0; k < taps.count; ++k) {
        weight[before + k] = static_cast<float>(weight_of(taps, k, interpolation) / sum);
      }
    }
  }

  RowTaps taps() const { return {first.data(), weights.data(), count}; }
  const float* weights_of(int64_t i) const { return weights.data() + i * count; }
  size_t bytes() const { return first.bytes() + weights.bytes(); }
};

class Resizer {
 public:
  // image [h, w, C] -> out [H, W, C]
  void run(const uint8_t* image, int64_t h, int64_t w, int64_t channels, uint8_t* out, int64_t new_h, int64_t new_w,
           Interpolation interpolation) {
    const int64_t n = new_w * channels;
    float* const row = start(h, w, channels, new_h, new_w, interpolation);
    float* const sums = sums_.reserve(n + kResizePad);
    uint8_t* const narrow = narrow_bytes_.reserve(h * n);
    for (int64_t y = 0; y < h; ++y) {
      kernels().to_floats(image + y * w * channels, w * channels, row);
      kernels().blend_pixels(row, columns_.taps(), new_w, channels, sums);
      kernels().to_bytes(sums, n, narrow + y * n);
    }
    for (int64_t y = 0; y < new_h; ++y) {
      kernels().blend_byte_rows(narrow + rows_.first[y] * n, n, rows_.weights_of(y), rows_.count, n, sums);
      kernels().to_bytes(sums, n, out + y * n);
    }
  }

  void run(const float* image, int64_t h, int64_t w, int64_t channels, float* out, int64_t new_h, int64_t new_w,
           Interpolation interpolation) {
    const int64_t n = new_w * channels;
    float* const row = start(h, w, channels, new_h, new_w, interpolation);
    float* const narrow = narrow_.reserve(h * n + kResizePad);
    for (int64_t y = 0; y < h; ++y) {
      std::copy_n(image + y * w * channels, w * channels, row);
      kernels().blend_pixels(row, columns_.taps(), new_w, channels, narrow + y * n);
    }
    for (int64_t y = 0; y < new_h; ++y) {
      kernels().blend_float_rows(narrow + rows_.first[y] * n, n, rows_.weights_of(y), rows_.count, n, out + y * n);
    }
  }

  size_t bytes() const {
    return rows_.bytes() + columns_.bytes() + row_.bytes() + sums_.bytes() + narrow_.bytes() + narrow_bytes_.bytes();
  }

 private:
  // Computes the taps; returns memory for a row of the image as floats, with the padding that blend_pixels reads.
  float* start(int64_t h, int64_t w, int64_t channels, int64_t new_h, int64_t new_w, Interpolation interpolation) {
    columns_.compute(w, new_w, interpolation);
    rows_.compute(h, new_h, interpolation);
    float* const row = row_.reserve(w * channels + kResizePad);
    std::fill_n(row + w * channels, kResizePad, 0.0f);
    return row;
  }

  AxisTaps rows_, columns_;
  Buffer<float> row_, sums_, narrow_;
  Buffer<uint8_t> narrow_bytes_;
};

template <class T>
void run(const TensorView& image, const RaggedShape& from, const TensorView& out, const RaggedShape& to,
         Interpolation interpolation) {
  const int64_t channels = image.shape[1];
  for_each_image<Resizer>(from, [&](int64_t b, Resizer& resizer) {
    resizer.run(image.as<T>() + from.begin(b) * channels, from.height(b), from.width(b), channels,
                out.as<T>() + to.begin(b) * channels, to.height(b), to.width(b), interpolation);
  });
}

}  // namespace

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, Interpolation interpolation) {
  const char* op = "resize";
  expect(op, "image", image, image.dtype == DType::kUInt8 ? DType::kUInt8 : DType::kFloat32, {-1, -1});
  const RaggedShape from = expect_ragged(op, offsets, shapes, image.shape[0]);
  expect(op, "out", out, image.dtype, {-1, image.shape[1]});
  const RaggedShape to = expect_ragged(op, new_offsets, new_shapes, out.shape[0]);
  expect_sizes(from, to);
  (image.dtype == DType::kUInt8 ? run<uint8_t> : run<float>)(image, from, out, to, interpolation);
}

}  // namespace namedmask::cpu
