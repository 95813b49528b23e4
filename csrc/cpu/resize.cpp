// SPDX-License-Identifier: MIT
// Resizes the rows, then the columns. float32: a row at a time. uint8: the columns of an image are blended much faster
// than its rows, as vectors of neighboring bytes with a weight in common. So rows are transposed, kResizeRows at a
// time, blended as columns, rounded to uint8 (as in Pillow and torch), and transposed back. resize_kernel.h has the
// loops.
#include "namedmask/resize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "for_each_image.h"
#include "resize_filter.h"
#include "resize_levels.h"

namespace namedmask::cpu {
namespace {

const ResizeKernels& kernels() { return NMK_BEST(resize); }

// The taps of all pixels of an axis. They are kept for the next image.
class AxisTaps {
 public:
  void compute(int64_t from, int64_t to, Interpolation interpolation) {
    if (from == from_ && to == to_ && interpolation == interpolation_) return;
    from_ = to_ = 0;  // until all is computed: memory may run out
    most_ = 0;
    first_.reserve(to);
    counts_.reserve(to);
    for (int64_t i = 0; i < to; ++i) {
      const Taps taps = taps_of(i, from, to, interpolation);
      first_[i] = taps.first;
      counts_[i] = taps.count;
      most_ = std::max<int64_t>(most_, taps.count);
    }
    weights_.reserve(to * most_);
    for (int64_t i = 0; i < to; ++i) {
      const Taps taps = taps_of(i, from, to, interpolation);
      double* const weights = weights_.data() + i * most_;
      double sum = 0;
      for (int32_t k = 0; k < taps.count; ++k) sum += weights[k] = weight_of(taps, k, interpolation);
      for (int32_t k = 0; k < taps.count; ++k) weights[k] /= sum;
      std::fill_n(weights + taps.count, most_ - taps.count, 0.0);
    }
    has_floats_ = has_integers_ = false;
    from_ = from, to_ = to, interpolation_ = interpolation;
  }

  FloatTaps floats() {
    if (!has_floats_) {
      std::copy_n(weights_.data(), to_ * most_, float_weights_.reserve(to_ * most_));
      has_floats_ = true;
    }
    return {first_.data(), counts_.data(), float_weights_.data(), most_};
  }

  ByteTaps integers() {
    if (!has_integers_) {
      quantize();
      has_integers_ = true;
    }
    return {first_.data(), counts_.data(), integer_weights_.data(), shifts_.data(), most_};
  }

  // Whether all taps of pixel i are among the first `count`.
  bool end_before(int64_t i, int64_t count) const { return first_[i] + counts_[i] <= count; }

  size_t bytes() const {
    return first_.bytes() + counts_.bytes() + shifts_.bytes() + weights_.bytes() + float_weights_.bytes() +
           integer_weights_.bytes();
  }

 private:
  // The weights of a pixel in the most bits with which none exceeds an int16, and no sum of 255 * weight an int32. The
  // sums of the weights so far are rounded instead of the weights, so that all sum to exactly 1 << shift.
  void quantize() {
    const int64_t padded = most_ + most_ % 2;
    int16_t* weight = integer_weights_.reserve(to_ * padded);
    shifts_.reserve(to_);
    const double* exact = weights_.data();
    for (int64_t i = 0; i < to_; ++i, exact += most_, weight += padded) {
      const double largest = *std::max_element(exact, exact + most_);
      int32_t shift = 14;
      while (shift < 22 && largest * (2 << shift) < INT16_MAX - 1) ++shift;
      shifts_[i] = shift;
      weight[padded - 1] = 0;
      double sum = 0;
      long done = 0;
      for (int64_t k = 0; k < most_; ++k) {
        sum += exact[k];
        const long upto = std::lround(sum * (1 << shift));
        weight[k] = static_cast<int16_t>(upto - done);
        done = upto;
      }
    }
  }

  int64_t from_ = 0, to_ = 0, most_ = 0;
  Interpolation interpolation_ = Interpolation::kBilinear;
  bool has_floats_ = false, has_integers_ = false;
  Buffer<int32_t> first_, counts_, shifts_;
  Buffer<double> weights_;
  Buffer<float> float_weights_;
  Buffer<int16_t> integer_weights_;
};

struct Size {
  int64_t height, width;
};

class Resizer {
 public:
  // image [from, C]; calls emit(y, row) with the rows [to.width, C] of the resized image in order.
  template <class Emit>
  void run(const uint8_t* image, Size from, int64_t channels, Size to, Interpolation interpolation, Emit emit) {
    const int64_t wide = from.width * channels, n = to.width * channels;
    const bool keeps_width = from.width == to.width, keeps_height = from.height == to.height;
    if (!keeps_width) columns_.compute(from.width, to.width, interpolation);
    if (!keeps_height) rows_.compute(from.height, to.height, interpolation);
    const uint8_t* const narrow = keeps_width ? image : narrow_bytes_.reserve(from.height * n);
    uint8_t* const blended = keeps_height ? nullptr : row_bytes_.reserve(n);
    int64_t y = 0;  // the next row to emit
    for (int64_t ready = 0; y < to.height;) {
      const int64_t count = std::min(kResizeRows, from.height - ready);
      if (!keeps_width) {
        uint8_t* const before = tile_.reserve(kResizeRows * (wide + n));
        uint8_t* const after = before + kResizeRows * wide;
        kernels().to_columns(image + ready * wide, count, wide, before);
        kernels().blend_bytes(before, columns_.integers(), 0, to.width, kResizeRows * channels, after);
        kernels().to_rows(after, count, n, narrow_bytes_.data() + ready * n);
      }
      ready += count;
      for (; y < to.height && (keeps_height ? y < ready : rows_.end_before(y, ready)); ++y) {
        if (keeps_height) {
          emit(y, narrow + y * n);
        } else {
          kernels().blend_bytes(narrow, rows_.integers(), y, 1, n, blended);
          emit(y, blended);
        }
      }
    }
  }

  void run(const float* image, Size from, int64_t channels, Size to, Interpolation interpolation, float* out) {
    const int64_t wide = from.width * channels, n = to.width * channels;
    columns_.compute(from.width, to.width, interpolation);
    rows_.compute(from.height, to.height, interpolation);
    const bool keeps_width = from.width == to.width, keeps_height = from.height == to.height;
    float* const padded = row_.reserve(wide + kResizePad);
    std::fill_n(padded + wide, kResizePad, 0.0f);
    float* const narrow = narrow_.reserve(from.height * n + kResizePad);
    for (int64_t y = 0; y < from.height; ++y) {
      if (keeps_width) {
        std::copy_n(image + y * wide, n, narrow + y * n);
        continue;
      }
      std::copy_n(image + y * wide, wide, padded);
      kernels().blend_pixels(padded, columns_.floats(), to.width, channels, narrow + y * n);
    }
    if (keeps_height) {
      std::copy_n(narrow, to.height * n, out);
      return;
    }
    for (int64_t y = 0; y < to.height; ++y) kernels().blend_rows(narrow, rows_.floats(), y, n, out + y * n);
  }

  size_t bytes() const {
    return rows_.bytes() + columns_.bytes() + row_.bytes() + narrow_.bytes() + narrow_bytes_.bytes() +
           row_bytes_.bytes() + tile_.bytes();
  }

 private:
  AxisTaps rows_, columns_;
  Buffer<float> row_, narrow_;
  Buffer<uint8_t> narrow_bytes_, row_bytes_, tile_;
};

// Writes row y of an image of `width` pixels into its patches, out [rows, columns, C, p, p].
template <class T>
void put_row(const uint8_t* row, int64_t y, int64_t width, int64_t channels, const T* levels, int64_t patch,
             int64_t columns, T* out) {
  const int64_t area = patch * patch;
  T* target = out + y / patch * columns * channels * area + y % patch * patch;
  for (int64_t x = 0; x < columns * patch; target += channels * area) {
    for (int64_t i = 0; i < patch; ++i, ++x, row += channels) {
      for (int64_t c = 0; c < channels; ++c) target[c * area + i] = x < width ? levels[c * 256 + row[c]] : T{0};
    }
  }
}

template <class T>
void run_levels(const TensorView& image, const ResizeBatch& batch, const TensorView& out, const TensorView& levels,
                Interpolation interpolation, int64_t patch) {
  for_each_image<Resizer>(batch.from, [&](int64_t b, Resizer& resizer) {
    const int64_t channels = batch.channels, width = batch.width(b), columns = batch.to.width(b);
    T* const target = out.as<T>() + batch.to.begin(b) * channels * patch * patch;
    resizer.run(image.as<uint8_t>() + batch.from.begin(b) * channels, {batch.from.height(b), batch.from.width(b)},
                channels, {batch.height(b), width}, interpolation, [&](int64_t y, const uint8_t* row) {
                  put_row(row, y, width, channels, levels.as<T>(), patch, columns, target);
                });
    for (int64_t y = batch.height(b); y < batch.to.height(b) * patch; ++y) {
      put_row<T>(nullptr, y, 0, channels, levels.as<T>(), patch, columns, target);
    }
  });
}

template <class T>
void run_values(const TensorView& image, const ResizeBatch& batch, const TensorView& out, Interpolation interpolation) {
  for_each_image<Resizer>(batch.from, [&](int64_t b, Resizer& resizer) {
    const T* const source = image.as<T>() + batch.from.begin(b) * batch.channels;
    T* const target = out.as<T>() + batch.to.begin(b) * batch.channels;
    const Size from = {batch.from.height(b), batch.from.width(b)}, to = {batch.height(b), batch.width(b)};
    if (from.height == to.height && from.width == to.width) {
      std::copy_n(source, to.height * to.width * batch.channels, target);
    } else if constexpr (sizeof(T) == 1) {
      const int64_t n = to.width * batch.channels;
      resizer.run(source, from, batch.channels, to, interpolation,
                  [&](int64_t y, const uint8_t* row) { std::copy_n(row, n, target + y * n); });
    } else {
      resizer.run(source, from, batch.channels, to, interpolation, target);
    }
  });
}

}  // namespace

void resize(const TensorView& image, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
            const TensorView& new_offsets, const TensorView& new_shapes, const TensorView& sizes,
            const TensorView& levels, Interpolation interpolation, int64_t patch) {
  const ResizeBatch batch =
      expect_resize(image, offsets, shapes, out, new_offsets, new_shapes, sizes, levels, patch, Device::kCPU);
  if (batch.normalizes) {
    (levels.element_size() == 2 ? run_levels<uint16_t> : run_levels<uint32_t>)(image, batch, out, levels, interpolation,
                                                                               patch);
  } else {
    (image.dtype == DType::kUInt8 ? run_values<uint8_t> : run_values<float>)(image, batch, out, interpolation);
  }
}

}  // namespace namedmask::cpu
