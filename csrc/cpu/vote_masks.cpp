// SPDX-License-Identifier: MIT
// A mask is a row of bits; the intersection of a pair is the number of bits in the AND of two rows, and unions follow
// from the areas.
#include "namedmask/vote_masks.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "level.h"
#include "threads.h"
#include "vote_masks_levels.h"

namespace namedmask::cpu {
namespace {

constexpr int64_t kBytesForThreads = 1 << 24;

const VoteKernels& kernels() { return NMK_BEST_IF(vote_masks, __builtin_cpu_supports("avx512vpopcntdq")); }

int64_t words_of(int64_t pixels) { return (pixels + 64 * kVoteWords - 1) / (64 * kVoteWords) * kVoteWords; }

bool any(const uint8_t* bytes, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    if (bytes[i * stride]) return true;
  }
  return false;
}

uint8_t spans(const uint8_t* mask, int64_t h, int64_t w) {
  const bool height = any(mask, w, 1) && any(mask + (h - 1) * w, w, 1);
  const bool width = any(mask, h, w) && any(mask + w - 1, h, w);
  return static_cast<uint8_t>((height ? kFullHeight : 0) | (width ? kFullWidth : 0));
}

// A batch with its masks as rows of words_of(pixels) words. After the last row of an image follow kVoteMasks - 1 rows
// that are read but not used.
struct Election {
  const uint8_t* masks;
  RaggedShape batch;
  int64_t n;
  uint8_t* kept;
  uint8_t* reasons;
  uint64_t* bits;     // of one image after another
  const int64_t* at;  // [B]: first word of an image
  int64_t* pairs;     // [B, n, n rounded up to kVoteMasks]: pixels in both i and j, for j >= i in groups of kVoteMasks
  const VoteKernels& kernels;

  int64_t pixels(int64_t b) const { return batch.end(b) - batch.begin(b); }
  int64_t stride() const { return (n + kVoteMasks - 1) / kVoteMasks * kVoteMasks; }

  void pack(int64_t b, int64_t i) const {
    const int64_t p = pixels(b);
    const uint8_t* mask = masks + n * batch.begin(b) + i * p;
    kernels.pack(mask, p, bits + at[b] + i * words_of(p));
    reasons[b * n + i] = p ? spans(mask, batch.height(b), batch.width(b)) : 0;
  }

  void compare(int64_t b, int64_t i) const {
    const int64_t words = words_of(pixels(b));
    const uint64_t* rows = bits + at[b];
    for (int64_t j = i / kVoteMasks * kVoteMasks; j < n; j += kVoteMasks) {
      kernels.common(rows + i * words, rows + j * words, words, pairs + (b * n + i) * stride() + j);
    }
  }

  int32_t count(int64_t b, double* scores) const {
    const int64_t* common = pairs + b * n * stride();
    const auto area = [&](int64_t i) { return common[i * stride() + i]; };
    bool none_left = true;
    for (int64_t i = 0; i < n; ++i) {
      if (!area(i)) reasons[b * n + i] = kEmpty;
      kept[b * n + i] = !reasons[b * n + i];
      none_left = none_left && !kept[b * n + i];
    }
    if (none_left) std::fill_n(kept + b * n, n, 1);
    int32_t winner = -1;
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = 0;
      if (!kept[b * n + i]) continue;
      for (int64_t j = 0; j < n; ++j) {
        if (!kept[b * n + j]) continue;
        const int64_t both = common[std::min(i, j) * stride() + std::max(i, j)];
        scores[i] += static_cast<double>(both) / (static_cast<double>(area(i) + area(j) - both) + 1e-7);
      }
      if (winner < 0 || scores[i] > scores[winner]) winner = static_cast<int32_t>(i);
    }
    return winner;
  }
};

}  // namespace

void vote_masks(const TensorView& masks, const TensorView& offsets, const TensorView& shapes, const TensorView& winner,
                const TensorView& kept, const TensorView& reasons, const TensorView& scores) {
  expect("vote_masks", "masks", masks, DType::kBool, {-1});
  const RaggedShape batch = expect_vote(masks, offsets, shapes, winner, kept, reasons, scores, Device::kCPU);
  const int64_t images = kept.shape[0], n = kept.shape[1];
  if (n == 0) {
    std::fill_n(winner.as<int32_t>(), images, -1);
    return;
  }
  std::vector<int64_t> at(images);
  int64_t total = 0;
  for (int64_t b = 0; b < images; ++b) {
    at[b] = total;
    total += (n + kVoteMasks - 1) * words_of(batch.end(b) - batch.begin(b));
  }
  const std::unique_ptr<uint64_t[]> bits(new uint64_t[total]);
  const int64_t stride = (n + kVoteMasks - 1) / kVoteMasks * kVoteMasks;
  const std::unique_ptr<int64_t[]> pairs(new int64_t[images * n * stride]);
  const Election election{masks.as<uint8_t>(), batch,     n,           kept.as<uint8_t>(), reasons.as<uint8_t>(),
                          bits.get(),          at.data(), pairs.get(), kernels()};
  // With less work, waking threads costs more than it gains.
#pragma omp parallel num_threads(thread_count()) if (masks.shape[0] > kBytesForThreads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < images * n; ++i) election.pack(i / n, i % n);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < images * n; ++i) election.compare(i / n, i % n);
  }
  for (int64_t b = 0; b < images; ++b) winner.as<int32_t>()[b] = election.count(b, scores.as<double>() + b * n);
}

}  // namespace namedmask::cpu
