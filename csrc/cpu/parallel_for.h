// SPDX-License-Identifier: MIT
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace namedmask::cpu {

// Calls f(i) for i < n in chunks of at least `grain` and returns when all calls are done. Threads of the enclosing
// parallel region that wait at the end of a worksharing loop or a `single` take chunks too. At a barrier, a thread that
// the system does not schedule would delay all others; here it delays nothing. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  // libgomp runs a loop of more than 64 tasks per thread in the calling thread alone.
  const int64_t tasks = std::clamp<int64_t>(n / grain, 1, 32 * omp_get_num_threads());
#pragma omp taskloop num_tasks(tasks) shared(f)
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace namedmask::cpu
