// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace namedmask::cpu {

// Makes the system provide all missing pages of an output before it is written. Outputs are often in fresh memory,
// where a page fault per 4 kB takes longer than labeling the pixels in it: 250 us for 480 x 480 labels, against 100 us
// in one call. If no page is missing, the check takes 1 us. Does nothing where the system lacks the calls.
inline void prefault_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE (Linux 5.14), not defined by older C libraries
  constexpr uintptr_t kPage = 4096;   // if this is wrong, the calls fail and nothing happens
  constexpr uintptr_t kPages = 1024;  // per call
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end < begin + 8 * kPage) return;
  unsigned char there[kPages];
  for (uintptr_t at = begin; at < end; at += kPages * kPage) {
    const uintptr_t count = std::min((end - at) / kPage, kPages);
    void* const pages = reinterpret_cast<void*>(at);
    if (mincore(pages, count * kPage, there) != 0) return;
    const auto missing = [](unsigned char page) { return (page & 1) == 0; };
    if (std::any_of(there, there + count, missing)) madvise(pages, count * kPage, kPopulateWrite);
  }
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace namedmask::cpu
