// SPDX-License-Identifier: MIT
// A block works on a strip of 32 columns, so that its warps read whole sectors of rows: a lane has a column, a warp a
// segment of rows. The pixels that begin a run are counted per column and then, in a second pass, written to their
// place.
#include "images.h"
#include "namedmask/run_lengths.h"

namespace namedmask::cuda {
namespace {

constexpr int kStrip = 32;  // columns per block
constexpr int kWarps = 32;  // segments of rows

struct StripedImages : Images {
  // `before`: number of columns of the images before these.
  StripedImages(const Images& images, int64_t before) : Images(images), first_column(static_cast<int32_t>(before)) {
    for (int32_t i = 0; i < count; ++i) {
      const int32_t columns = height[i] == 0 ? 0 : width[i];
      strips[i + 1] = strips[i] + (columns + kStrip - 1) / kStrip;
      chunks[i + 1] = chunks[i] + columns;  // what add_ranks scans
    }
  }

  int32_t first_column;
  int32_t strips[kMaxImages + 1] = {};  // number of strips of the images before this one
};

// Calls f(y) for the pixels of this thread that differ from the one before them in column-major order.
template <class F>
__device__ void for_each_begin(const Image& image, const uint8_t* all, F f) {
  const uint8_t* mask = all + image.begin;
  const auto lane = static_cast<int32_t>(threadIdx.x), warp = static_cast<int32_t>(threadIdx.y);
  const int32_t x = image.block * kStrip + lane, w = image.width, h = image.height;
  const int32_t rows = (h + kWarps - 1) / kWarps, top = warp * rows, bottom = min(top + rows, h);
  if (x >= w || top >= h) return;
  bool before = top > 0 ? mask[(top - 1) * w + x] != 0 : x > 0 && mask[(h - 1) * w + x - 1] != 0;
  for (int32_t y = top; y < bottom; ++y) {
    const bool value = mask[y * w + x] != 0;
    if (value != before) f(y);
    before = value;
  }
}

__device__ int32_t count_begins(const Image& image, const uint8_t* mask) {
  int32_t count = 0;
  for_each_begin(image, mask, [&](int32_t) { ++count; });
  return count;
}

__device__ int32_t column_of(const StripedImages& images, int place, const Image& image) {
  return images.first_column + images.chunks[place] + image.block * kStrip + static_cast<int32_t>(threadIdx.x);
}

// columns[c] = number of runs that begin in the column.
__global__ void __launch_bounds__(kStrip* kWarps)
    count_columns(const __grid_constant__ StripedImages images, const uint8_t* mask, int32_t* columns) {
  __shared__ int32_t counts[kWarps][kStrip];
  const int place = my_place(images, images.strips);
  const Image image = image_at(images, images.strips, place);
  counts[threadIdx.y][threadIdx.x] = count_begins(image, mask);
  __syncthreads();
  if (threadIdx.y != 0 || image.block * kStrip + static_cast<int32_t>(threadIdx.x) >= image.width) return;
  int32_t sum = 0;
  for (int32_t warp = 0; warp < kWarps; ++warp) sum += counts[warp][threadIdx.x];
  columns[column_of(images, place, image)] = sum;
}

// Writes the column-major positions of the pixels that begin a run, those of each image in ascending order.
__global__ void __launch_bounds__(kStrip* kWarps)
    write_begins(const __grid_constant__ StripedImages images, const uint8_t* mask, const int32_t* columns,
                 const int32_t* first, int32_t* begins) {
  __shared__ int32_t counts[kWarps][kStrip];
  const int place = my_place(images, images.strips);
  const Image image = image_at(images, images.strips, place);
  counts[threadIdx.y][threadIdx.x] = count_begins(image, mask);
  __syncthreads();
  const int32_t x = image.block * kStrip + static_cast<int32_t>(threadIdx.x);
  if (x >= image.width) return;
  int32_t* out = begins + first[image.index] + columns[column_of(images, place, image)];
  for (unsigned warp = 0; warp < threadIdx.y; ++warp) out += counts[warp][threadIdx.x];
  for_each_begin(image, mask, [&](int32_t y) { *out++ = x * image.height + y; });
}

// One block per image: the differences of the positions, from 0 and to the number of pixels.
__global__ void __launch_bounds__(256) subtract(const __grid_constant__ StripedImages images, const int32_t* first,
                                                const int32_t* begins, int32_t* lengths) {
  const auto place = static_cast<int32_t>(blockIdx.x);
  const int32_t begin = first[images.first + place], last = first[images.first + place + 1] - 1;
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i <= last; i += static_cast<int32_t>(blockDim.x)) {
    const int32_t end = i == last ? images.height[place] * images.width[place] : begins[i];
    lengths[i] = end - (i == begin ? 0 : begins[i - 1]);
  }
}

// Calls f(images, strips) for groups of images that fit one launch.
template <class F>
void for_each_striped_group(const RaggedShape& batch, F f) {
  int64_t before = 0;
  for_each_group(batch, [&](Images group, int64_t) {
    std::fill(group.chunks, group.chunks + kMaxImages + 1, 0);
    const StripedImages images(group, before);
    before += images.chunks[images.count];
    f(images, images.strips[images.count]);
  });
}

const dim3 kThreads(kStrip, kWarps);

}  // namespace

void run_counts(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& columns,
                const TensorView& counts, Stream stream) {
  const char* op = "run_lengths";
  expect(op, "mask", mask, DType::kBool, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  int64_t total = 0;
  for (int64_t b = 0; b < batch.count; ++b) total += batch.width(b);
  expect(op, "columns", columns, DType::kInt32, {total}, Device::kCUDA);
  expect(op, "counts", counts, DType::kInt32, {batch.count}, Device::kCUDA);
  const OnDevice device(mask);
  for_each_striped_group(batch, [&](const StripedImages& images, int64_t strips) {
    launch(count_columns, strips, kThreads, stream, images, mask.as<uint8_t>(), columns.as<int32_t>());
    launch(add_ranks, images.count, 32, stream, images, columns.as<int32_t>() + images.first_column,
           counts.as<int32_t>());
  });
}

void run_lengths(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& columns,
                 const TensorView& first, const TensorView& begins, const TensorView& lengths, Stream stream) {
  const char* op = "run_lengths";
  expect(op, "mask", mask, DType::kBool, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "columns", columns, DType::kInt32, {-1}, Device::kCUDA);
  expect(op, "first", first, DType::kInt32, {batch.count + 1}, Device::kCUDA);
  expect(op, "lengths", lengths, DType::kInt32, {-1}, Device::kCUDA);
  expect(op, "begins", begins, DType::kInt32, {lengths.shape[0]}, Device::kCUDA);
  const OnDevice device(mask);
  for_each_striped_group(batch, [&](const StripedImages& images, int64_t strips) {
    launch(write_begins, strips, kThreads, stream, images, mask.as<uint8_t>(), columns.as<int32_t>(),
           first.as<int32_t>(), begins.as<int32_t>());
    launch(subtract, images.count, 256, stream, images, first.as<int32_t>(), begins.as<int32_t>(),
           lengths.as<int32_t>());
  });
}

}  // namespace namedmask::cuda
