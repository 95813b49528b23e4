// SPDX-License-Identifier: MIT
// S is symmetric, so a tile of it above the diagonal serves its rows and, turned, its columns. A column of ones beside
// the masks gives the rows' sums. Tiles stand in kGroups groups with sums of their own, which are added in order: so
// threads share the work of a photo and the bits do not depend on them.
#include "namedmask/random_walk.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <vector>

#include "level.h"
#include "normalized_rows.h"
#include "random_walk_levels.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "random_walk";
constexpr int64_t kGroups = 8;

const WalkKernels& kernels() { return NMK_BEST(random_walk); }

// What a thread needs for itself.
struct Scratch {
  Scratch() = default;
  explicit Scratch(int64_t channels) : rows(kBlock * channels), weights(kBlock * kBlock) {}
  std::vector<float> rows, weights;
};

class Walk {
 public:
  Walk(float sharpness, const WalkKernels& kernels) : sharpness_(sharpness), kernels_(kernels) {}

  // Allocates. `buffers`: 1, or kGroups where gather() is called from several threads at once.
  void prepare(const float* masks, int64_t m, const float* features, int64_t n, int64_t channels, int64_t buffers) {
    n_ = n, m_ = m, channels_ = channels;
    width_ = round_up(m + 1, kWalkUnit);
    rows_.prepare(features, n, channels, /*rows=*/false, /*panels=*/true);
    size_ = rows_.padded() * width_;
    masks_ = mask_memory_.reserve(size_);
    total_ = total_memory_.reserve(size_);
    sums_ = sum_memory_.reserve(size_ * buffers);
    std::fill_n(masks_, size_, 0.0f);  // tokens beyond n and columns beyond m weigh nothing
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(masks + i * m, m, masks_ + i * width_);
      masks_[i * width_ + m] = 1;
    }
  }

  NormalizedRows& rows() { return rows_; }
  int64_t blocks() const { return rows_.padded() / kBlock; }

  // The sums of one group's tiles.
  void gather(int64_t group, int64_t buffer, Scratch& scratch) {
    float* sums = sums_ + buffer * size_;
    std::fill_n(sums, size_, 0.0f);
    for (int64_t block = group; block < blocks(); block += kGroups) {
      const int64_t row = block * kBlock;
      for (int64_t i = 0; i < kBlock; ++i) rows_.unit_row(row + i, scratch.rows.data() + i * channels_);
      for (int64_t column = row; column < rows_.padded(); column += kBlock) {
        const int64_t columns = std::min(kBlock, round_up(n_ - column, kWord));  // those that hold tokens
        float* weights = scratch.weights.data();
        kernels_.weigh(scratch.rows.data(), rows_.panel_of(column), channels_, sharpness_, columns, column == row,
                       weights);
        kernels_.add(weights, columns, masks_ + column * width_, width_, sums + row * width_);
        if (column > row) {
          kernels_.add_transposed(weights, columns, masks_ + row * width_, width_, sums + column * width_);
        }
      }
    }
  }

  // A group's sums added to those of the groups before it; rows of one block.
  void add_up(int64_t group, int64_t buffer, int64_t block) {
    const int64_t begin = block * kBlock * width_, end = begin + kBlock * width_;
    const float* sums = sums_ + buffer * size_;
    for (int64_t i = begin; i < end; ++i) total_[i] = group ? total_[i] + sums[i] : sums[i];
  }

  // The masks after a step: totals divided by the rows' sums.
  void divide(int64_t block) {
    for (int64_t i = block * kBlock; i < std::min(n_, (block + 1) * kBlock); ++i) {
      float *mask = masks_ + i * width_, *total = total_ + i * width_;
      for (int64_t c = 0; c < m_; ++c) mask[c] = total[c] / total[m_];
    }
  }

  void write(float* out) const {
    for (int64_t i = 0; i < n_; ++i) std::copy_n(masks_ + i * width_, m_, out + i * m_);
  }

 private:
  const float sharpness_;
  const WalkKernels& kernels_;
  int64_t n_ = 0, m_ = 0, channels_ = 0, width_ = 0, size_ = 0;
  NormalizedRows rows_;
  Buffer<float> mask_memory_, total_memory_, sum_memory_;
  float *masks_ = nullptr, *total_ = nullptr, *sums_ = nullptr;
};

}  // namespace

void random_walk(const TensorView& masks, const TensorView& features, const TensorView& offsets,
                 const TensorView& shapes, const TensorView& out, int64_t steps, double sharpness) {
  expect(kOp, "features", features, DType::kFloat32, {-1, -1});
  const int64_t total = features.shape[0], channels = features.shape[1];
  const RaggedShape batch = expect_ragged(kOp, offsets, shapes, total);
  expect(kOp, "masks", masks, DType::kFloat32, {total, -1});
  const int64_t m = masks.shape[1];
  expect(kOp, "out", out, DType::kFloat32, {total, m});
  if (steps < 0 || !(sharpness >= 0 && sharpness < INFINITY)) {
    throw std::invalid_argument(std::string(kOp) + ": steps must be at least 0, sharpness finite and at least 0");
  }
  const auto prepare = [&](Walk& walk, int64_t b, int64_t buffers) {
    const int64_t at = batch.begin(b);
    walk.prepare(masks.as<float>() + at * m, m, features.as<float>() + at * channels, batch.end(b) - at, channels,
                 buffers);
  };
  const auto result = [&](int64_t b) { return out.as<float>() + batch.begin(b) * m; };
  const auto factor = static_cast<float>(sharpness);
  const WalkKernels& chosen = kernels();
  std::vector<uint8_t> refused(batch.count, 0);
  std::exception_ptr failure;
  if (batch.count == 1) {
    Walk walk(factor, chosen);
    prepare(walk, 0, kGroups);
    std::vector<Scratch> scratches(omp_get_max_threads(), Scratch(channels));
#pragma omp parallel
    {
      Scratch& scratch = scratches[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < walk.rows().panels(); ++i) walk.rows().normalize(i);
      for (int64_t step = 0; step < steps; ++step) {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < kGroups; ++group) walk.gather(group, group, scratch);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < walk.blocks(); ++block) {
          for (int64_t group = 0; group < kGroups; ++group) walk.add_up(group, group, block);
          walk.divide(block);
        }
      }
    }
    refused[0] = !walk.rows().finite();
    walk.write(result(0));
  } else {
#pragma omp parallel
    {
      Walk walk(factor, chosen);
      Scratch scratch;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < batch.count; ++b) {
        try {
          prepare(walk, b, 1);
          scratch = Scratch(channels);
          for (int64_t i = 0; i < walk.rows().panels(); ++i) walk.rows().normalize(i);
          for (int64_t step = 0; step < steps; ++step) {
            for (int64_t group = 0; group < kGroups; ++group) {
              walk.gather(group, 0, scratch);
              for (int64_t block = 0; block < walk.blocks(); ++block) walk.add_up(group, 0, block);
            }
            for (int64_t block = 0; block < walk.blocks(); ++block) walk.divide(block);
          }
          refused[b] = !walk.rows().finite();
          walk.write(result(b));
        } catch (...) {  // an exception must not leave a parallel region
#pragma omp critical(nmk_random_walk)
          failure = std::current_exception();
        }
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
  const auto first = std::find(refused.begin(), refused.end(), 1);
  if (first != refused.end()) {
    throw std::invalid_argument(std::string(kOp) + ": features must be finite, but those of photo " +
                                std::to_string(first - refused.begin()) + " hold NaN or Inf");
  }
}

}  // namespace namedmask::cpu
