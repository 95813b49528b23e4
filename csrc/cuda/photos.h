// SPDX-License-Identifier: MIT
// All photos of a ragged batch in one launch: which photo a thread block works on, and ranks of some of its items.
#pragma once

#include <algorithm>

#include "block.h"
#include "launch.h"

namespace namedmask::cuda {
namespace {

constexpr int kChunk = 1024;    // items in raster order that a block works on together
constexpr int kMaxPhotos = 64;  // per launch: the tables below must fit the 4 kB of a kernel's arguments

// The photos of one launch. It travels as a kernel argument: no copy to the device, nothing to keep alive, and the
// launch stays asynchronous (and can be captured in a CUDA graph). Larger batches are launched in groups.
struct Photos {
  int32_t first = 0, count = 0;    // photos first .. first + count of the batch
  int32_t begin[kMaxPhotos] = {};  // row of the photo's first pixel
  int32_t height[kMaxPhotos] = {}, width[kMaxPhotos] = {};
  int32_t chunks[kMaxPhotos + 1] = {};  // chunks of the photos before this one
};

struct Photo {
  int32_t index, begin, height, width;
  int32_t block;  // the chunk (or tile) of this photo that the thread block works on

  __device__ int32_t pixels() const { return height * width; }
  __device__ int32_t chunk_item() const { return block * kChunk + static_cast<int32_t>(threadIdx.x); }
};

// The place in the table of the photo that this thread block belongs to, given the blocks of the photos before each.
__device__ inline int my_place(const Photos& photos, const int32_t* blocks) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = photos.count - 1;  // the last photo whose first block is not after this one
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

__device__ inline Photo photo_at(const Photos& photos, const int32_t* blocks, int place) {
  return {photos.first + place, photos.begin[place], photos.height[place], photos.width[place],
          static_cast<int32_t>(blockIdx.x) - blocks[place]};
}

__device__ inline Photo my_photo(const Photos& photos, const int32_t* blocks) {
  return photo_at(photos, blocks, my_place(photos, blocks));
}

// Calls f(photos, chunks) for groups of photos that fit a launch; `items` of them for every pixel.
template <class F>
void for_each_group(const RaggedShape& batch, F f, int64_t items = 1) {
  for (int64_t first = 0; first < batch.count; first += kMaxPhotos) {
    Photos photos;
    photos.first = static_cast<int32_t>(first);
    photos.count = static_cast<int32_t>(std::min<int64_t>(kMaxPhotos, batch.count - first));
    for (int32_t i = 0; i < photos.count; ++i) {
      const int64_t h = batch.height(first + i), w = batch.width(first + i);
      photos.begin[i] = static_cast<int32_t>(batch.begin(first + i));
      photos.height[i] = static_cast<int32_t>(h);
      photos.width[i] = static_cast<int32_t>(w);
      photos.chunks[i + 1] = photos.chunks[i] + static_cast<int32_t>((items * h * w + kChunk - 1) / kChunk);
    }
    f(photos, photos.chunks[photos.count]);
  }
}

// Bits below `lane`.
__device__ inline unsigned below(unsigned lane) { return (1u << lane) - 1; }

// How many threads of a block of kChunk before this one have `chosen`; the block's number of them goes to *total.
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

// One warp per photo: the numbers chosen in each chunk -> in the chunks before it, and the photo's total.
__global__ void add_ranks(const __grid_constant__ Photos photos, int32_t* chunk_totals, int32_t* counts) {
  const auto b = static_cast<int32_t>(blockIdx.x), lane = static_cast<int32_t>(threadIdx.x);
  const int32_t begin = photos.chunks[b], end = photos.chunks[b + 1];
  const int32_t per_lane = (end - begin + 31) / 32;
  const int32_t mine = min(begin + lane * per_lane, end), mine_end = min(mine + per_lane, end);
  int32_t sum = 0;
  for (int32_t c = mine; c < mine_end; ++c) sum += chunk_totals[c];
  const int32_t upto = inclusive_scan(sum);
  if (lane == 31) counts[photos.first + b] = upto;
  int32_t before = upto - sum;
  for (int32_t c = mine; c < mine_end; ++c) {
    const int32_t chosen = chunk_totals[c];
    chunk_totals[c] = before;
    before += chosen;
  }
}

}  // namespace
}  // namespace namedmask::cuda
