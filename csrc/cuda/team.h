// SPDX-License-Identifier: MIT
// The threads that work on an image together: those of one block, or of a cluster of blocks. They exchange values
// through device memory, in a fixed order, so that results are bit-identical in every run.
#pragma once

#include "block.h"
#include "cluster.h"

namespace namedmask::cuda {

constexpr int kMaxTeamWarps = 32;

// kBlocksOfTeam consecutive blocks of kBlockWarps warps each.
template <int kBlocksOfTeam, int kBlockWarps>
class Team {
 public:
  static constexpr int kBlocks = kBlocksOfTeam;
  static constexpr int kWarps = kBlocks * kBlockWarps;
  static constexpr int kThreads = 32 * kWarps, kBlockThreads = 32 * kBlockWarps;
  static_assert(kWarps <= kMaxTeamWarps && (kWarps & (kWarps - 1)) == 0);

  // The number of doubles at `memory` for reductions of up to `values` at once.
  __host__ __device__ static int64_t memory_size(int64_t values) { return 2 * values * kMaxTeamWarps; }

  __device__ Team(double* memory, int64_t values) : memory_(memory), values_(values) {}

  // The number of the calling thread, of its warp, and of its team.
  __device__ static int32_t thread() {
    return static_cast<int32_t>(blockIdx.x % kBlocks * kBlockThreads + threadIdx.x);
  }
  __device__ static int32_t warp() { return thread() / 32; }
  __device__ static int32_t number() { return static_cast<int32_t>(blockIdx.x / kBlocks); }

  // Waits for all threads of the team. What each wrote before, the others then read.
  __device__ static void sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  // A reduction: next_parts(), `put` by all threads for each value, sync(), `get` by whole warps. There are two sets of
  // parts in turn: who writes to a set has passed the barrier of the other, before which all had read this one.
  __device__ double* next_parts() { return memory_ + (turn_ ^= 1) * values_ * kWarps; }
  template <class F>
  __device__ static void put(double* parts, int32_t value, double mine, F combine) {
    put_of_warp(parts, value, warp_reduce(mine, combine));
  }
  __device__ static void put_of_warp(double* parts, int32_t value, double reduced) {
    if (threadIdx.x % 32 == 0) parts[value * kWarps + warp()] = reduced;
  }
  template <class F>
  __device__ static double get(const double* parts, int32_t value, F combine) {
    double result = parts[value * kWarps + threadIdx.x % kWarps];
    for (int step = min(kWarps, 32) / 2; step; step /= 2) {
      result = combine(result, __shfl_xor_sync(kAllLanes, result, step));
    }
    return result;
  }

  template <class F>
  __device__ double reduce(double mine, F combine) {
    double* const parts = next_parts();
    put(parts, 0, mine, combine);
    sync();
    return get(parts, 0, combine);
  }

 private:
  double* memory_;
  int64_t values_;
  int turn_ = 0;
};

}  // namespace namedmask::cuda
