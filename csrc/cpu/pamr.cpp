// SPDX-License-Identifier: MIT
// Argument checks, and the conversion between images and the planes that the kernels work on; the arithmetic is in
// pamr_kernel.h.
#include "namedmask/pamr.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "for_each_image.h"
#include "pamr_levels.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "pamr";
constexpr int64_t kLabels = 24;            // per pass, so that memory does not grow with the number of labels
constexpr int64_t kWindowBytes = 1 << 20;  // of the masks around a row, which should stay in a core's L2 cache

const PamrKernels& kernels() { return NMK_BEST(pamr); }

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialized memory, in huge pages where the system supports them: a vector of masks has neighbors in 300 small
// pages, more than the TLB of a core holds, and thousands of page faults take time.
template <class T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t size = count * static_cast<int64_t>(sizeof(T)), page = size < kHuge ? 64 : kHuge;
  const int64_t bytes = round_up(size, page);
  void* memory = std::aligned_alloc(page, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (page == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

class Refiner {
 public:
  Refiner(int64_t height, int64_t width, const int64_t* dilations, int64_t n_dilations) : image_{} {
    image_.height = height;
    image_.width = width;
    image_.dilations = dilations;
    image_.n_dilations = n_dilations;
    reach_ = std::min(*std::max_element(dilations, dilations + n_dilations), std::max(height, width));
    image_.columns = round_up(width, kPamrColumns);
    image_.pad = round_up(std::min(reach_, width), kPamrColumns);
    image_.stride = image_.columns + 2 * image_.pad;
    if (image_.stride % 256 == 0)
      image_.stride += kPamrColumns;  // otherwise the planes would share few sets of the L1 cache
  }

  // masks, out [H * W, labels]; image [H * W, 3]
  void run(const float* masks, const uint8_t* image, int64_t labels, int64_t iterations, float* out) {
    const int64_t most = std::min(labels, kLabels);
    const auto planes =
        allocate<float>(image_.height * std::max(pamr_row(image_.stride, 3), 2 * pamr_row(image_.stride, most)));
    const auto weights = allocate<uint16_t>(image_.height * pamr_weights(image_.columns, image_.n_dilations));
    image_.colors = planes.get();
    image_.weights = weights.get();
    unpack(image, 3, 0, 3, planes.get());
    for (int64_t y = 0; y < image_.height; ++y) kernels().affinities(image_, y);
    for (int64_t first = 0; first < labels; first += kLabels) {
      const int64_t count = std::min(kLabels, labels - first);
      float *source = planes.get(), *target = source + image_.height * pamr_row(image_.stride, count);
      unpack(masks, labels, first, count, source);
      for (int64_t i = 0; i < iterations; ++i, std::swap(source, target)) average(source, target, count);
      pack(source, labels, first, count, out);
    }
  }

 private:
  // Channels [first, first + count) of pixels [H * W, channels] -> padded planes [H, count, stride].
  template <class T>
  void unpack(const T* pixels, int64_t channels, int64_t first, int64_t count, float* planes) const {
    for (int64_t y = 0; y < image_.height; ++y, planes += pamr_row(image_.stride, count)) {
      for (int64_t x = 0; x < image_.width; ++x, pixels += channels) {
        for (int64_t c = 0; c < count; ++c) planes[c * image_.stride + image_.pad + x] = pixels[first + c];
      }
      repeat_borders(planes, count);
    }
  }

  void pack(const float* planes, int64_t channels, int64_t first, int64_t count, float* pixels) const {
    for (int64_t y = 0; y < image_.height; ++y, planes += pamr_row(image_.stride, count)) {
      for (int64_t x = 0; x < image_.width; ++x, pixels += channels) {
        for (int64_t c = 0; c < count; ++c) pixels[first + c] = planes[c * image_.stride + image_.pad + x];
      }
    }
  }

  // Pads one row of `count` planes beyond the image's columns.
  void repeat_borders(float* row, int64_t count) const {
    for (float* end = row + count * image_.stride; row < end; row += image_.stride) {
      float *begin = row + image_.pad, *last = begin + image_.width - 1;
      std::fill(row, begin, *begin);
      std::fill(last + 1, row + image_.stride, *last);
    }
  }

  // One iteration, in strips narrow enough that the masks around a row stay in the cache for the next row.
  void average(const float* source, float* target, int64_t count) const {
    const int64_t rows = std::min(image_.height, 2 * reach_ + 1);
    const int64_t fits = kWindowBytes / (static_cast<int64_t>(sizeof(float)) * count * rows) - 2 * image_.pad;
    const int64_t strip = std::max<int64_t>(round_up(fits, kPamrColumns), 4 * kPamrColumns);
    for (int64_t x = 0; x < image_.columns; x += strip) {
      const int64_t end = std::min(x + strip, image_.columns);
      for (int64_t y = 0; y < image_.height; ++y) {
        kernels().average(image_, source, target, count, y, x, end);
        if (end == image_.columns) repeat_borders(target + y * pamr_row(image_.stride, count), count);
      }
    }
  }

  PamrImage image_;
  int64_t reach_;  // the largest dilation, at most the image's size
};

// The index of each list's first dilation.
std::vector<int64_t> first_dilations(const std::vector<int64_t>& dilations, const std::vector<int64_t>& counts,
                                     int64_t images) {
  const auto lists = static_cast<int64_t>(counts.size()), total = static_cast<int64_t>(dilations.size());
  if (lists != 1 && lists != images) throw std::invalid_argument("pamr: dilations must be one list, or one per image");
  std::vector<int64_t> first;
  int64_t next = 0;
  bool valid = std::all_of(dilations.begin(), dilations.end(), [](int64_t d) { return d >= 1; });
  for (const int64_t count : counts) {
    valid = valid && count >= 1 && count <= kPamrDilations;
    first.push_back(next);
    next += count;
  }
  if (!valid || next != total) throw std::invalid_argument("pamr: dilations must be 1 to 16 numbers of at least 1");
  return first;
}

}  // namespace

void pamr(const TensorView& masks, const TensorView& image, const TensorView& offsets, const TensorView& shapes,
          const TensorView& out, const std::vector<int64_t>& dilations, const std::vector<int64_t>& counts,
          int64_t iterations) {
  expect(kOp, "masks", masks, DType::kFloat32, {-1, -1});
  const int64_t pixels = masks.shape[0], labels = masks.shape[1];
  expect(kOp, "image", image, DType::kUInt8, {pixels, 3});
  expect(kOp, "out", out, DType::kFloat32, {pixels, labels});
  const RaggedShape batch = expect_ragged(kOp, offsets, shapes, pixels);
  const std::vector<int64_t> first = first_dilations(dilations, counts, batch.count);
  if (iterations < 0) throw std::invalid_argument("pamr: iterations must be at least 0");
  if (labels == 0) return;
  for_each_image(batch, [&](int64_t b) {
    const int64_t list = counts.size() == 1 ? 0 : b;
    Refiner(batch.height(b), batch.width(b), dilations.data() + first[list], counts[list])
        .run(masks.as<float>() + labels * batch.begin(b), image.as<uint8_t>() + 3 * batch.begin(b), labels, iterations,
             out.as<float>() + labels * batch.begin(b));
  });
}

}  // namespace namedmask::cpu
