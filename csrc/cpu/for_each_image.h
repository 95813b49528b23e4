// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "namedmask/tensor_view.h"
#include "threads.h"

namespace namedmask::cpu {

// Calls f(b) for every image b that has pixels, one image per thread, in one parallel region. Rethrows what f throws.
// `shared`: f calls parallel_for (parallel_for.h), so that even a single image requires the threads.
template <class F>
void for_each_image(const RaggedShape& batch, F f, bool shared = false) {
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic) num_threads(thread_count()) if (shared || batch.count > 1)
  for (int64_t b = 0; b < batch.count; ++b) {
    if (batch.begin(b) == batch.end(b)) continue;
    try {
      f(b);
    } catch (...) {  // an exception must not leave a parallel region
#pragma omp critical(nmk_for_each_image)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// A Worker holds the memory for one image at a time. Each thread keeps its Worker for the next call, unless it has
// grown beyond this. 4 MB are enough for an image of 512 x 683.
constexpr size_t kKeptBytes = 64 << 20;

// The same with f(b, worker), where `worker` is the calling thread's.
template <class Worker, class F>
void for_each_image(const RaggedShape& batch, F f, bool shared = false) {
  const auto run = [&](int64_t b) {
    // A pointer: the address of a thread_local object would be looked up again in every loop of f.
    thread_local std::unique_ptr<Worker> worker;
    if (!worker) worker = std::make_unique<Worker>();
    f(b, *worker);
    if (worker->bytes() > kKeptBytes) worker.reset();
  };
  for_each_image(batch, run, shared);
}

// The same, where f returns whether the values of `argument` in image b are finite. Throws std::invalid_argument that
// names the first image with NaN or Inf, after all images are done.
template <class Worker, class F>
void for_each_finite_image(const char* op, const char* argument, const RaggedShape& batch, F f, bool shared = false) {
  std::vector<uint8_t> finite(batch.count, 1);
  for_each_image<Worker>(batch, [&](int64_t b, Worker& worker) { finite[b] = f(b, worker); }, shared);
  const auto first = std::find(finite.begin(), finite.end(), 0);
  if (first == finite.end()) return;
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be finite, but image " +
                              std::to_string(first - finite.begin()) + " holds NaN or Inf");
}

}  // namespace namedmask::cpu
