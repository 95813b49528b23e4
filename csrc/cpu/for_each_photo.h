// SPDX-License-Identifier: MIT
#pragma once

#include <exception>
#include <memory>

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

// A Worker holds the memory for one photo at a time; each thread keeps one for its next call, unless it has grown
// beyond this. 4 MB serve a photo of 512 x 683.
constexpr size_t kKeptBytes = 64 << 20;

// Calls f(b, worker) for every photo that has pixels, photos spread over threads. What f throws comes out here.
// `shared`: f shares its work out (parallel_for.h), so that a single photo needs the threads too.
template <class Worker, class F>
void for_each_photo(const RaggedShape& batch, F f, bool shared = false) {
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic) if (shared || batch.count > 1)
  for (int64_t b = 0; b < batch.count; ++b) {
    if (batch.begin(b) == batch.end(b)) continue;
    try {
      // Behind a pointer: of an object that is thread_local itself the loops in f would ask the address at every turn.
      thread_local std::unique_ptr<Worker> worker;
      if (!worker) worker = std::make_unique<Worker>();
      f(b, *worker);
      if (worker->bytes() > kKeptBytes) worker.reset();
    } catch (...) {  // an exception must not leave a parallel region
#pragma omp critical(nmk_for_each_photo)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace namedmask::cpu
