// SPDX-License-Identifier: MIT
#pragma once

namespace namedmask::cpu {

// Number of threads for a parallel region of the calling thread: OpenMP's number, but at most `limit_threads`. It is 1
// in the thread that a fork copies: libgomp's threads do not exist in the child, and a region would wait for them.
int thread_count();

// Sets the upper bound of `thread_count`, at least 1. Initially there is none.
void limit_threads(int count);

}  // namespace namedmask::cpu
