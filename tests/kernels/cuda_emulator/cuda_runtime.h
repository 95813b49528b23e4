// SPDX-License-Identifier: MIT
// Takes the place of CUDA's <cuda_runtime.h> and runs kernels on the CPU; tests/kernels/emulator.py says what that
// shows and what it does not.
//
// Every thread of a block is a fiber, which runs until it reaches a barrier, a warp collective or an atomic. The fibers
// take turns in random order. Blocks run one after another, also in random order; those of a cluster run together.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another and can use the same copy; not those of a cluster
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "the emulator was told to fail"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum { cudaLaunchAttributeClusterDimension = 1, cudaLaunchAttributeClusterSchedulingPolicyPreference };
enum { cudaClusterSchedulingPolicySpread };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int clusterSchedulingPolicyPreference;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  const cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { kReady, kWarp, kBlock, kCluster, kDone };  // waits for its warp, block or cluster

using Offer = std::array<uint32_t, 6>;

struct Fiber {
  ucontext_t start;
  jmp_buf paused;  // swapcontext would make a system call, to save the signal mask, every time
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  unsigned collectives;  // so far
  Offer offered[2];      // values for the other lanes; two, because a lane may be one collective ahead of another
  static constexpr size_t kStack = 32 << 10;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;
inline std::mt19937 random;
inline cudaError_t launch_error = cudaSuccess;  // what launches return instead of running the kernel
inline int ptx_version = 80;                    // of all kernels; clusters require 90

[[gnu::noinline]] inline void pause(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.paused) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  while (true) {  // a fiber is reused for one block after another
    body();
    pause(State::kDone);
  }
}

// Runs a thread until it pauses or is done.
[[gnu::noinline]] inline void resume(unsigned thread) {
  current = thread;
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.paused, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = Fiber::kStack;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Makes the threads first .. last ready if all of them wait in `state`. A block's barrier does not wait for threads
// that have returned. A warp's collective does, and never completes: such a kernel is wrong.
inline bool free_if_all_wait(unsigned first, unsigned last, State state) {
  bool any = false;
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].state != state && !(state == State::kBlock && fibers[t].state == State::kDone)) return false;
    any |= fibers[t].state == state;
  }
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].state == state) fibers[t].state = State::kReady;
  }
  return any;
}

// Runs `count` blocks, the first of which is `first`, together.
inline void run_cluster(unsigned first, unsigned count) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z, all = count * threads;
  if (count > 1 && threads % 32 != 0) std::abort();  // a warp would have threads of two blocks
  if (fibers.size() < all) fibers.resize(all);
  for (unsigned t = 0; t < all; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = State::kReady;
    fiber.collectives = 0;
  }
  std::vector<unsigned> order(all);
  std::iota(order.begin(), order.end(), 0u);
  while (true) {
    bool ran = false, left = false;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (fibers[i].state == State::kReady) {
        ran = true;
        const unsigned t = i % threads;
        threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
        blockIdx = dim3(first + i / threads);
        resume(i);
      }
      left |= fibers[i].state != State::kDone;
    }
    if (!left) return;
    if (ran) continue;
    bool freed = false;
    for (unsigned t = 0; t + 32 <= all; t += 32) freed |= free_if_all_wait(t, t + 32, State::kWarp);
    for (unsigned t = 0; !freed && t < all; t += threads) freed |= free_if_all_wait(t, t + threads, State::kBlock);
    if (!freed && !free_if_all_wait(0, all, State::kCluster)) {
      std::fputs("emulator: deadlock: threads wait at different barriers\n", stderr);
      std::abort();
    }
  }
}

// Offers a value of up to 24 bytes to the other lanes and waits until all have offered theirs. Returns the parity with
// which to read them.
template <class T>
unsigned offer(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= sizeof(Offer));
  if (mask != 0xffffffffu) std::abort();  // only collectives of whole warps are supported
  Fiber& fiber = fibers[current];
  const unsigned parity = fiber.collectives++ % 2;
  std::memcpy(fiber.offered[parity].data(), &value, sizeof(T));
  pause(State::kWarp);
  return parity;
}

// The value that another lane of the warp offered.
template <class T>
T offered(unsigned lane, unsigned parity) {
  T value;
  std::memcpy(&value, fibers[current / 32 * 32 + lane].offered[parity].data(), sizeof(T));
  return value;
}

inline void interleave() {  // lets other threads go first in one of four cases
  if (random() % 4 == 0) pause(State::kReady);
}

template <class T, class F>
T atomic(T* at, F f) {
  interleave();
  const T old = *at;
  *at = f(old);
  return old;
}

}  // namespace emulator

inline void __syncthreads() { emulator::pause(emulator::State::kBlock); }

inline void __syncwarp() { emulator::offer(0xffffffffu, 0); }

inline unsigned __ballot_sync(unsigned mask, bool value) {
  const unsigned parity = emulator::offer(mask, value);
  unsigned word = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    word |= static_cast<unsigned>(emulator::offered<bool>(lane, parity)) << lane;
  }
  return word;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::offered<T>(lane % 32, emulator::offer(mask, value));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int lane = emulator::current % 32;
  return __shfl_sync(mask, value, lane >= by ? lane - by : lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  return __shfl_sync(mask, value, emulator::current % 32 ^ by);
}

namespace namedmask::cuda {

// csrc/cuda/cluster.h says what it does.
inline void cluster_sync() { emulator::pause(emulator::State::kCluster); }

// csrc/cuda/mma.h says what it does.
inline void multiply_add_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulator::Offer mine = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned parity = emulator::offer(0xffffffffu, mine), lane = emulator::current % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 32; ++k) {
      const unsigned byte = k % 4 * 8, t = k % 16 / 4;
      const auto left = emulator::offered<emulator::Offer>(row % 8 * 4 + t, parity)[k / 16 * 2 + row / 8];
      const auto right = emulator::offered<emulator::Offer>(column * 4 + t, parity)[4 + k / 16];
      c[i] += static_cast<int32_t>(left >> byte & 255) * static_cast<int8_t>(right >> byte & 255);
    }
  }
}

}  // namespace namedmask::cuda

template <class T>
T atomicAdd(T* at, T value) {
  return emulator::atomic(at, [&](T old) { return old + value; });
}
template <class T>
T atomicMin(T* at, T value) {
  return emulator::atomic(at, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* at, T value) {
  return emulator::atomic(at, [&](T old) { return std::max(old, value); });
}

template <class T>
T atomicCAS(T* at, T expected, T value) {
  return emulator::atomic(at, [&](T old) { return old == expected ? value : old; });
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? 1 + std::countr_zero(static_cast<unsigned>(x)) : 0; }
inline int __popc(unsigned x) { return std::popcount(x); }
using std::max;
using std::min;

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = emulator::ptx_version;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (emulator::launch_error != cudaSuccess) return emulator::launch_error;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) size = config->attrs[i].val.clusterDim.x;
  }
  std::tuple<Parameters...> values(arguments...);
  emulator::body = [&] { std::apply(kernel, values); };
  std::vector<unsigned> clusters(gridDim.x / size);
  std::iota(clusters.begin(), clusters.end(), 0u);
  std::shuffle(clusters.begin(), clusters.end(), emulator::random);
  for (unsigned cluster : clusters) emulator::run_cluster(cluster * size, size);
  return cudaSuccess;
}
