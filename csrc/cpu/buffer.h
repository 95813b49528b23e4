// SPDX-License-Identifier: MIT
// Scratch memory that is reused from image to image.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace namedmask::cpu {

// Uninitialized memory that is reused: page faults in fresh memory would cost a tenth of the time.
template <class T>
class Buffer {
 public:
  T* data() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t bytes() const { return capacity_ * sizeof(T); }

  T* reserve(size_t count) {  // keeps the contents
    if (count <= capacity_) return data();
    count = std::max(count, capacity_ + capacity_ / 2);
    void* grown = std::realloc(data_.get(), count * sizeof(T));
    if (grown == nullptr) throw std::bad_alloc();
    static_cast<void>(data_.release());
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
