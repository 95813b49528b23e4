// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace namedmask::cpu {

// Calls f(i) for i < n in chunks of `grain` and returns when all calls are done. Threads of the enclosing parallel
// region that wait at the end of a worksharing loop or a `single` take chunks too. At a barrier, a thread that the
// system does not schedule would delay all others; here it delays nothing. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
#pragma omp taskloop grainsize(grain) shared(f)
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace namedmask::cpu
