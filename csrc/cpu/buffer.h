// SPDX-License-Identifier: MIT
// Scratch memory that is reused from image to image.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace namedmask::cpu {

// Uninitialized memory that is reused: page faults in fresh memory would cost a tenth of the time. Begins at a cache
// line, so that vectors that fill a line lie in one.
template <class T>
class Buffer {
 public:
  T* data() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t bytes() const { return capacity_ * sizeof(T); }

  T* reserve(size_t count) {  // keeps the contents
    if (count <= capacity_) return data();
    count = std::max(count, capacity_ + capacity_ / 2);
    constexpr size_t kLine = 64;
    void* grown = std::aligned_alloc(kLine, (count * sizeof(T) + kLine - 1) / kLine * kLine);
    if (grown == nullptr) throw std::bad_alloc();
    if (capacity_) std::memcpy(grown, data_.get(), capacity_ * sizeof(T));
    data_.reset(static_cast<T*>(grown));
    capacity_ = count;
    return data();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace namedmask::cpu
