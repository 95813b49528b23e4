// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace namedmask::cpu {

// Calls f(i), i < n, `grain` of them at a time, and returns when all are done. The threads of the parallel region that
// wait at the end of a worksharing loop or `single` take their share; one that the system does not run meanwhile holds
// nothing up, as it would at a barrier. f may not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
#pragma omp taskloop grainsize(grain) shared(f)
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace namedmask::cpu
