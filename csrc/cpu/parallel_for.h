// SPDX-License-Identifier: MIT
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace namedmask::cpu {

// Calls f(i) for i < n in chunks of `grain`, started in order, and returns when all calls are done. Threads of the
// enclosing parallel region that wait at the end of a worksharing loop or a `single` take chunks too. At a barrier, a
// thread that the system does not schedule would delay all others; here it delays nothing. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  std::atomic<int64_t> next{0};
  // A task per thread and not per chunk: libgomp starts tasks in an order of its own, which unbalances chunks of
  // falling size, and runs more than 64 tasks per thread in the calling thread alone.
  const int threads = omp_get_num_threads();
#pragma omp taskloop num_tasks(threads) shared(next, f)
  for (int thread = 0; thread < threads; ++thread) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;) {
      for (int64_t i = begin; i < std::min(begin + grain, n); ++i) f(i);
    }
  }
}

}  // namespace namedmask::cpu
