// SPDX-License-Identifier: MIT
// All images of a ragged batch in one launch: maps thread blocks to images, and ranks selected items of an image.
#pragma once

#include <algorithm>

#include "block.h"
#include "launch.h"

namespace namedmask::cuda {
namespace {

constexpr int kChunk = 1024;    // items, in raster order, per block
constexpr int kMaxImages = 64;  // per launch: the tables below must fit the 4 kB of a kernel's arguments

// The images of one launch, passed as a kernel argument: there is no copy to the device and nothing to keep alive, and
// the launch is asynchronous (and can be captured in a CUDA graph). Larger batches are launched in groups.
struct Images {
  int32_t first = 0, count = 0;    // images first .. first + count of the batch
  int32_t begin[kMaxImages] = {};  // row of the image's first pixel
  int32_t height[kMaxImages] = {}, width[kMaxImages] = {};
  int32_t chunks[kMaxImages + 1] = {};  // number of chunks of the images before this one
};

struct Image {
  int32_t index, begin, height, width;
  int32_t block;  // the chunk (or tile) of this image that the thread block works on

  __device__ int32_t pixels() const { return height * width; }
  __device__ int32_t chunk_item() const { return block * kChunk + static_cast<int32_t>(threadIdx.x); }
};

// The index in the table of the image of this thread block, given the number of blocks before each image.
__device__ inline int my_place(const Images& images, const int32_t* blocks) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = images.count - 1;  // the last image whose first block is not beyond this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (blocks[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline Image image_at(const Images& images, const int32_t* blocks, int place) {
  return {images.first + place, images.begin[place], images.height[place], images.width[place],
          static_cast<int32_t>(blockIdx.x) - blocks[place]};
}

__device__ inline Image my_image(const Images& images, const int32_t* blocks) {
  return image_at(images, blocks, my_place(images, blocks));
}

// Calls f(images, chunks) for groups of images that fit one launch, with `items` items per pixel.
template <class F>
void for_each_group(const RaggedShape& batch, F f, int64_t items = 1) {
  for (int64_t first = 0; first < batch.count; first += kMaxImages) {
    Images images;
    images.first = static_cast<int32_t>(first);
    images.count = static_cast<int32_t>(std::min<int64_t>(kMaxImages, batch.count - first));
    for (int32_t i = 0; i < images.count; ++i) {
      const int64_t h = batch.height(first + i), w = batch.width(first + i);
      images.begin[i] = static_cast<int32_t>(batch.begin(first + i));
      images.height[i] = static_cast<int32_t>(h);
      images.width[i] = static_cast<int32_t>(w);
      images.chunks[i + 1] = images.chunks[i] + static_cast<int32_t>((items * h * w + kChunk - 1) / kChunk);
    }
    f(images, images.chunks[images.count]);
  }
}

// Bits below `lane`.
__device__ inline unsigned below(unsigned lane) { return (1u << lane) - 1; }

// The number of threads before this one, in a block of kChunk, that have `chosen`; *total = their number in the block.
__device__ inline int32_t rank_in_chunk(bool chosen, int32_t* total) {
  __shared__ int32_t warp_chosen[kChunk / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned word = __ballot_sync(kAllLanes, chosen);
  if (lane == 0) warp_chosen[warp] = __popc(word);
  __syncthreads();
  int32_t before = 0;
  for (unsigned v = 0; v < warp; ++v) before += warp_chosen[v];
  const int32_t rank = before + __popc(word & below(lane));
  if (threadIdx.x == kChunk - 1) *total = rank + chosen;
  return rank;
}

// One warp per image: replaces the number of chosen items per chunk by the sum over the chunks before it, and writes
// the image's total.
__global__ void __launch_bounds__(32)
    add_ranks(const __grid_constant__ Images images, int32_t* chunk_totals, int32_t* counts) {
  const auto b = static_cast<int32_t>(blockIdx.x), lane = static_cast<int32_t>(threadIdx.x);
  const int32_t begin = images.chunks[b], end = images.chunks[b + 1];
  const int32_t per_lane = (end - begin + 31) / 32;
  const int32_t mine = min(begin + lane * per_lane, end), mine_end = min(mine + per_lane, end);
  int32_t sum = 0;
  for (int32_t c = mine; c < mine_end; ++c) sum += chunk_totals[c];
  const int32_t upto = inclusive_scan(sum);
  if (lane == 31) counts[images.first + b] = upto;
  int32_t before = upto - sum;
  for (int32_t c = mine; c < mine_end; ++c) {
    const int32_t chosen = chunk_totals[c];
    chunk_totals[c] = before;
    before += chosen;
  }
}

}  // namespace
}  // namespace namedmask::cuda
