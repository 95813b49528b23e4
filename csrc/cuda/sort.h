// SPDX-License-Identifier: MIT
// Prefix sums and a stable radix sort. Not CUB's, which the emulator of tests/kernels cannot run.
#pragma once

#include <utility>

#include "images.h"

namespace namedmask::cuda {
namespace {

// The exclusive scan of the values of a block of kChunk threads; *total = the sum of all.
__device__ inline int32_t sum_before(int32_t value, int32_t* total) {
  __shared__ int32_t of_warp[kChunk / 32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int32_t upto = inclusive_scan(value);
  if (lane == 31) of_warp[warp] = upto;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (int v = 0; v < kChunk / 32; ++v) {
    if (v < warp) before += of_warp[v];
    all += of_warp[v];
  }
  __syncthreads();
  *total = all;
  return before + upto - value;
}

__global__ void sum_chunks(int32_t* values, int64_t n, int32_t* totals) {
  const int64_t i = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  int32_t total;
  const int32_t before = sum_before(i < n ? values[i] : 0, &total);
  if (i < n) values[i] = before;
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

__global__ void sum_totals(int32_t* totals, int64_t n) {  // one block
  int32_t sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t i = begin + threadIdx.x;
    int32_t total;
    const int32_t before = sum_before(i < n ? totals[i] : 0, &total);
    if (i < n) totals[i] = sum + before;
    sum += total;
  }
}

__global__ void add_totals(int32_t* values, int64_t n, const int32_t* totals) {
  const int64_t i = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (i < n) values[i] += totals[blockIdx.x];
}

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// values[i] = the sum of values[0 .. i). totals [chunks_of(n)] is scratch.
void exclusive_sum(int32_t* values, int64_t n, int32_t* totals, Stream stream) {
  launch(sum_chunks, chunks_of(n), kChunk, stream, values, n, totals);
  launch(sum_totals, n > 0, kChunk, stream, totals, chunks_of(n));
  launch(add_totals, chunks_of(n), kChunk, stream, values, n, totals);
}

constexpr int kSortThreads = 256, kSortItems = 2048;  // of a block
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kSortThreads == kDigits);  // one thread per digit

// counts[digit][block] = the number of the block's keys with the digit.
__global__ void count_digits(const int32_t* keys, int64_t n, int shift, int32_t* counts) {
  __shared__ int32_t found[kDigits];
  found[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kSortItems;
  for (int64_t i = begin + threadIdx.x; i < min(begin + kSortItems, n); i += kSortThreads) {
    atomicAdd(&found[keys[i] >> shift & (kDigits - 1)], 1);
  }
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = found[threadIdx.x];
}

// Moves keys and values behind all with smaller digits, given the scanned counts. Without values, moves the indices.
__global__ void move_by_digit(const int32_t* keys, const int32_t* values, int64_t n, int shift, const int32_t* sums,
                              int32_t* keys_out, int32_t* values_out) {
  constexpr int kWarps = kSortThreads / 32;
  __shared__ int32_t next[kDigits];  // the position of the block's next key with a digit
  __shared__ int32_t of_warp[kWarps][kDigits];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  next[threadIdx.x] = sums[int64_t{threadIdx.x} * gridDim.x + blockIdx.x];
  const int64_t begin = int64_t{blockIdx.x} * kSortItems, end = min(begin + kSortItems, n);
  for (int64_t start = begin; start < end; start += kSortThreads) {
    const int64_t i = start + threadIdx.x;
    const bool inside = i < end;
    const int32_t key = inside ? keys[i] : 0;
    const unsigned digit = key >> shift & (kDigits - 1);
    unsigned alike = __ballot_sync(kAllLanes, inside);  // lanes with the same digit
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const unsigned set = __ballot_sync(kAllLanes, digit >> bit & 1);
      alike &= digit >> bit & 1 ? set : ~set;
    }
    const int32_t rank = __popc(alike & below(lane));
    for (auto& counts : of_warp) counts[threadIdx.x] = 0;
    __syncthreads();
    if (inside && rank == 0) of_warp[warp][digit] = __popc(alike);
    __syncthreads();
    int32_t place = next[threadIdx.x];
    for (auto& counts : of_warp) {
      const int32_t count = counts[threadIdx.x];
      counts[threadIdx.x] = place;
      place += count;
    }
    next[threadIdx.x] = place;
    __syncthreads();
    if (inside) {
      const int32_t to = of_warp[warp][digit] + rank;
      keys_out[to] = key;
      values_out[to] = values == nullptr ? static_cast<int32_t>(i) : values[i];
    }
    __syncthreads();
  }
}

int64_t sort_blocks(int64_t n) { return (n + kSortItems - 1) / kSortItems; }

// The scratch memory of sort_numbers, in ints.
int64_t sort_scratch(int64_t n) { return kDigits * sort_blocks(n) + chunks_of(kDigits * sort_blocks(n)); }

struct Sorted {
  int32_t *keys, *numbers;
};

// Sorts the numbers 0 .. n - 1 by their keys, which are below 2^bits; stable. first and second: buffers [n], one of
// which is returned. A pass reads and writes 8 bytes per key, and reads the keys twice more.
Sorted sort_numbers(const int32_t* keys, int64_t n, int bits, Sorted first, Sorted second, int32_t* scratch,
                    Stream stream) {
  const int64_t blocks = sort_blocks(n);
  int32_t* const totals = scratch + kDigits * blocks;
  const int32_t* numbers = nullptr;
  for (int shift = 0; shift == 0 || shift < bits; shift += kDigitBits) {
    launch(count_digits, blocks, kSortThreads, stream, keys, n, shift, scratch);
    exclusive_sum(scratch, kDigits * blocks, totals, stream);
    launch(move_by_digit, blocks, kSortThreads, stream, keys, numbers, n, shift, scratch, first.keys, first.numbers);
    keys = first.keys;
    numbers = first.numbers;
    std::swap(first, second);
  }
  return second;
}

}  // namespace
}  // namespace namedmask::cuda
