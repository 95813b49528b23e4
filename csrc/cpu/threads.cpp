// SPDX-License-Identifier: MIT
#include "threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <climits>

namespace namedmask::cpu {
namespace {

std::atomic<int> limit{INT_MAX};
thread_local bool forked = false;

// Other threads of the child start after the fork and have libgomp threads of their own.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int thread_count() { return forked ? 1 : std::clamp(omp_get_max_threads(), 1, limit.load(std::memory_order_relaxed)); }

void limit_threads(int count) { limit = std::max(1, count); }

}  // namespace namedmask::cpu
