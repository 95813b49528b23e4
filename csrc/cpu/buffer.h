// SPDX-License-Identifier: MIT
// Scratch memory that is reused from image to image.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace namedmask::cpu {

// Uninitialized memory that is reused: page faults in fresh memory would cost a tenth of the time. Begins at a cache
// line, so that vectors that fill a line lie in one. From 2 MB on it has huge pages: operators walk through several
// arrays at a time or at random, and the TLB's entries for small pages do not cover them.
template <class T>
class Buffer {
 public:
  T* data() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t bytes() const { return capacity_ * sizeof(T); }

  T* reserve(size_t count) {  // keeps the contents
    if (count <= capacity_) return data();
    count = std::max(count, capacity_ + capacity_ / 2);
    void* grown = allocate(count * sizeof(T));
    if (capacity_) std::memcpy(grown, data_.get(), capacity_ * sizeof(T));
    data_.reset(static_cast<T*>(grown));
    capacity_ = count;
    return data();
  }

 private:
  static void* allocate(size_t bytes) {
    constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
    const size_t unit = bytes < kHugePage ? kLine : kHugePage;
    bytes = (bytes + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, bytes);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: if it fails, pages are small
#endif
    return memory;
  }

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace namedmask::cpu
