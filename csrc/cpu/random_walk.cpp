// SPDX-License-Identifier: MIT
// S is symmetric, so a tile above the diagonal serves both its rows and, transposed, its columns. A column of ones
// beside the masks gives the row sums. Tiles form kGroups groups, each with its own sums, which are added in order:
// threads share the work on an image, and the bits do not depend on them.
#include "namedmask/random_walk.h"

#include <algorithm>
#include <vector>

#include "for_each_image.h"
#include "normalized_rows.h"
#include "parallel_for.h"
#include "random_walk_levels.h"
#include "scale.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "random_walk";
constexpr int64_t kGroups = 8, kPanelsAtOnce = 8;

// The first step keeps the weights of as many tiles as fit this memory, all tiles of up to 4,032 tokens; later steps
// compute the others again. A step with kept weights only multiplies them by the masks: for 384 channels and 20 masks,
// a tenth of the flops.
constexpr int64_t kKeptWeights = (32 << 20) / sizeof(float);

const WalkKernels& kernels() { return NMK_BEST(random_walk); }

class Walk {
 public:
  // masks, out [n, m]; features [n, C]. False if the features are not finite; out is then unspecified. `shared`:
  // threads of a parallel region share the work, at the cost of more memory.
  bool run(const float* masks, int64_t m, const float* features, int64_t n, int64_t channels, int64_t steps,
           float sharpness, bool shared, float* out) {
    sharpness_ = sharpness;
    prepare(masks, m, features, n, channels, steps, shared ? kGroups : 1);
    if (shared) {
      parallel_for(rows_.panels(), kPanelsAtOnce, [&](int64_t panel) { rows_.normalize(panel); });
      for (int64_t step = 0; step < steps; ++step) {
        parallel_for(kGroups, 1, [&](int64_t group) { gather(step, group, group); });
        parallel_for(blocks(), 1, [&](int64_t block) {
          for (int64_t group = 0; group < kGroups; ++group) add_up(group, group, block);
          divide(block);
        });
      }
    } else {
      for (int64_t panel = 0; panel < rows_.panels(); ++panel) rows_.normalize(panel);
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t group = 0; group < kGroups; ++group) {
          gather(step, group, 0);
          for (int64_t block = 0; block < blocks(); ++block) add_up(group, 0, block);
        }
        for (int64_t block = 0; block < blocks(); ++block) divide(block);
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t c = 0; c < m_; ++c) out[i * m_ + c] = unscaled(masks_[i * width_ + c], scale_);
    }
    return rows_.finite();
  }

  size_t bytes() const {
    return rows_.bytes() + mask_memory_.bytes() + total_memory_.bytes() + sum_memory_.bytes() + tile_memory_.bytes() +
           kept_memory_.bytes();
  }

 private:
  static constexpr int64_t kWeights = kBlock * kBlock;  // of a tile

  // `buffers`: how many groups are summed at once.
  void prepare(const float* masks, int64_t m, const float* features, int64_t n, int64_t channels, int64_t steps,
               int64_t buffers) {
    n_ = n, m_ = m, channels_ = channels;
    width_ = round_up(m + 1, kWalkUnit);
    rows_.prepare(features, n, channels, /*rows=*/false, /*panels=*/true);
    size_ = rows_.padded() * width_;
    masks_ = mask_memory_.reserve(size_);
    total_ = total_memory_.reserve(size_);
    sums_ = sum_memory_.reserve(size_ * buffers);
    tiles_ = tile_memory_.reserve(tile_size() * buffers);
    kept_tiles_ = steps > 1 ? std::min(first_tile(blocks()), kKeptWeights / kWeights) : 0;
    kept_ = kept_memory_.reserve(kept_tiles_ * kWeights);
    std::fill_n(masks_, size_, 0.0f);  // tokens beyond n and columns beyond m have no weight
    scale_ = scale_of(largest_finite(masks, n * m));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < m; ++c) masks_[i * width_ + c] = masks[i * m + c] * scale_;
      masks_[i * width_ + m] = 1;
    }
  }

  int64_t blocks() const { return rows_.padded() / kBlock; }
  int64_t tile_size() const { return kBlock * channels_ + kWeights; }

  // The number of tiles above those of a block's rows.
  int64_t first_tile(int64_t block) const { return block * blocks() - block * (block - 1) / 2; }

  // Sums the tiles of one group.
  void gather(int64_t step, int64_t group, int64_t buffer) {
    float *sums = sums_ + buffer * size_, *rows = tiles_ + buffer * tile_size();
    std::fill_n(sums, size_, 0.0f);
    for (int64_t block = group; block < blocks(); block += kGroups) {
      const int64_t row = block * kBlock;
      const int64_t kept = step ? kept_tiles_ : 0;  // tiles whose weights are there
      int64_t tile = first_tile(block);
      if (kept < first_tile(block + 1)) {
        for (int64_t i = 0; i < kBlock; ++i) rows_.unit_row(row + i, rows + i * channels_);
      }
      for (int64_t column = row; column < rows_.padded(); column += kBlock, ++tile) {
        const int64_t columns = std::min(kBlock, round_up(n_ - column, kWord));  // columns that hold tokens
        float* weights = tile < kept_tiles_ ? kept_ + tile * kWeights : rows + kBlock * channels_;
        if (tile >= kept) {
          kernels_.weigh(rows, rows_.panel_of(column), channels_, sharpness_, columns, column == row, weights);
        }
        const float* next = tile + 1 < kept ? weights + kWeights : nullptr;
        kernels_.add(weights, columns, masks_ + column * width_, width_, next, sums + row * width_);
        if (column > row) {
          kernels_.add_transposed(weights, columns, masks_ + row * width_, width_, sums + column * width_);
        }
      }
    }
  }

  // Adds a group's sums for the rows of one block to those of the groups before it.
  void add_up(int64_t group, int64_t buffer, int64_t block) {
    const int64_t begin = block * kBlock * width_, end = begin + kBlock * width_;
    const float* sums = sums_ + buffer * size_;
    for (int64_t i = begin; i < end; ++i) total_[i] = group ? total_[i] + sums[i] : sums[i];
  }

  // Writes the masks after a step: the totals divided by the row sums.
  void divide(int64_t block) {
    for (int64_t i = block * kBlock; i < std::min(n_, (block + 1) * kBlock); ++i) {
      float *mask = masks_ + i * width_, *total = total_ + i * width_;
      for (int64_t c = 0; c < m_; ++c) mask[c] = total[c] / total[m_];
    }
  }

  const WalkKernels& kernels_ = kernels();
  float sharpness_ = 0, scale_ = 1;
  int64_t n_ = 0, m_ = 0, channels_ = 0, width_ = 0, size_ = 0;
  NormalizedRows rows_;
  int64_t kept_tiles_ = 0;
  Buffer<float> mask_memory_, total_memory_, sum_memory_, tile_memory_, kept_memory_;
  float *masks_ = nullptr, *total_ = nullptr;
  float* sums_ = nullptr;   // [buffers, padded tokens, width]
  float* tiles_ = nullptr;  // [buffers]: rows [kBlock, C], then weights [kBlock, kBlock]
  float* kept_ = nullptr;   // [kept_tiles_, kBlock, kBlock]
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
  if (steps < 0 || !(sharpness >= 0 && sharpness <= 1e6)) {
    throw std::invalid_argument(std::string(kOp) + ": steps must be at least 0, sharpness from 0 to 1e6");
  }
  const bool shared = batch.count == 1;
  const auto run = [&](int64_t b, Walk& walk) {
    const int64_t at = batch.begin(b);
    return walk.run(masks.as<float>() + at * m, m, features.as<float>() + at * channels, batch.end(b) - at, channels,
                    steps, static_cast<float>(sharpness), shared, out.as<float>() + at * m);
  };
  for_each_finite_image<Walk>(kOp, "features", batch, run, shared);
}

}  // namespace namedmask::cpu
