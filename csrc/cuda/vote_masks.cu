// SPDX-License-Identifier: MIT
// Each lane of a warp holds 32 pixels of one mask as the bits of a word, reads the words of the other lanes from shared
// memory, and counts the bits in common with each. The intersections of 32 x 32 pairs of masks stay in the registers of
// the warp, and every byte is read once. The four borders of the image count as masks, too: a candidate spans the
// height if it has pixels in common with the first and with the last row.
#include <climits>

#include "images.h"
#include "namedmask/vote_masks.h"

namespace namedmask::cuda {
namespace {

constexpr int kGroup = 32;     // masks, one per lane
constexpr int kWarps = 8;      // per block that counts pixels
constexpr int kPixels = 4096;  // per block
constexpr int kLoads = 16;     // at a time, per lane
constexpr int kBorders = 4;    // masks n .. n + 3: the first and last row, the first and last column
constexpr int kVoteWarps = 4;  // per block that elects

struct DividedImages : Images {
  explicit DividedImages(const Images& images) : Images(images) {
    for (int32_t i = 0; i < count; ++i) {
      const int64_t pixels = static_cast<int64_t>(height[i]) * width[i];
      blocks[i + 1] = blocks[i] + static_cast<int32_t>((pixels + kPixels - 1) / kPixels);
    }
  }

  int32_t blocks[kMaxImages + 1] = {};  // number of blocks of the images before this one
};

struct Masks {
  const uint8_t* bytes;
  int32_t n;

  __device__ int32_t size() const { return n + kBorders; }
};

// The bits of up to 32 pixels of this lane's mask, of the group that begins with mask `group`. `kByPixel`: an image is
// [h, w, n], so neighboring lanes read masks of a pixel; otherwise [n, h, w], and they read pixels of a mask.
template <bool kByPixel>
__device__ unsigned word_of(const Masks& masks, const Image& image, int32_t first, int32_t group) {
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int32_t pixels = image.pixels(), count = pixels - first, own = masks.n - group;
  const int32_t lanes = kByPixel ? own : count, rows = kByPixel ? count : own;
  const int64_t stride = kByPixel ? masks.n : pixels;
  const uint8_t* bytes = masks.bytes + static_cast<int64_t>(image.begin) * masks.n + lane +
                         (kByPixel ? first * stride + group : group * stride + first);
  unsigned word = 0;
#pragma unroll 1
  for (int begin = 0; begin < 32; begin += kLoads) {
    uint8_t loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k, bytes += stride) {
      loaded[k] = lane < lanes && begin + k < rows ? *bytes : 0;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if constexpr (kByPixel) {
        word |= static_cast<unsigned>(loaded[k] != 0) << (begin + k);
      } else {
        const unsigned bits = __ballot_sync(kAllLanes, loaded[k] != 0);
        if (lane == begin + k) word = bits;
      }
    }
  }
  const int32_t x = (first + lane) % image.width, y = (first + lane) / image.width;
  const bool borders[kBorders] = {y == 0, y == image.height - 1, x == 0, x == image.width - 1};
#pragma unroll
  for (int k = 0; k < kBorders; ++k) {
    const unsigned bits = __ballot_sync(kAllLanes, lane < count && borders[k]);
    if (lane == own + k) word = bits;
  }
  return word;
}

// Adds the pixels that are in both mask i of the group `rows` and mask j of the group `columns` to pairs[image][i][j].
template <bool kByPixel>
__global__ void __launch_bounds__(32 * kWarps)
    intersect(const __grid_constant__ DividedImages images, const __grid_constant__ Masks masks, int32_t rows,
              int32_t columns, int32_t* all_pairs) {
  __shared__ unsigned words[kWarps][kGroup];
  __shared__ int32_t sums[kGroup][kGroup];
  const Image image = my_image(images, images.blocks);
  const auto lane = static_cast<int32_t>(threadIdx.x), warp = static_cast<int32_t>(threadIdx.y);
  const int32_t used = min(masks.size() - rows, kGroup);
  const int32_t begin = image.block * kPixels, count = min(image.pixels() - begin, kPixels);
  int32_t counts[kGroup] = {};
  for (int32_t pixel = 32 * warp; pixel < count; pixel += 32 * kWarps) {
    const unsigned word = word_of<kByPixel>(masks, image, begin + pixel, columns);
    words[warp][lane] = rows == columns ? word : word_of<kByPixel>(masks, image, begin + pixel, rows);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < used) counts[i] += __popc(words[warp][i] & word);
    }
    __syncwarp();
  }
  for (int i = warp; i < kGroup; i += kWarps) sums[i][lane] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (counts[i]) atomicAdd(&sums[i][lane], counts[i]);
  }
  __syncthreads();
  const int64_t size = masks.size();
  int32_t* pairs = all_pairs + image.index * size * size;
  for (int i = warp; i < used; i += kWarps) {  // masks beyond the last have no pixels
    if (sums[i][lane]) atomicAdd(&pairs[(rows + i) * size + columns + lane], sums[i][lane]);
  }
}

// One block per image: computes which candidates vote, the scores and the winner.
__global__ void __launch_bounds__(32 * kVoteWarps) elect(int32_t n, const int32_t* all_pairs, int32_t* winner,
                                                         uint8_t* all_kept, uint8_t* all_reasons, double* all_scores) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t size = n + kBorders, image = blockIdx.x;
  const int32_t* pairs = all_pairs + image * size * size;
  uint8_t *kept = all_kept + image * n, *reasons = all_reasons + image * n;
  double* scores = all_scores + image * n;
  const auto common = [&](int32_t i, int32_t j) { return pairs[min(i, j) * size + max(i, j)]; };
  int32_t voters = 0;
  for (int32_t i = thread; i < n; i += 32 * kVoteWarps) {
    const bool height = common(i, n) && common(i, n + 1), width = common(i, n + 2) && common(i, n + 3);
    reasons[i] = static_cast<uint8_t>(common(i, i) ? (height ? kFullHeight : 0) | (width ? kFullWidth : 0) : kEmpty);
    kept[i] = !reasons[i];
    voters += kept[i];
  }
  const bool none_left = block_reduce<kVoteWarps>(voters, Sum()) == 0;
  for (int32_t i = thread; i < n; i += 32 * kVoteWarps) kept[i] |= none_left;
  __syncthreads();
  double best = 0;
  for (int32_t i = thread; i < n; i += 32 * kVoteWarps) {
    double score = 0;
    for (int32_t j = 0; kept[i] && j < n; ++j) {
      if (!kept[j]) continue;
      const int32_t both = common(i, j);
      const double either = static_cast<double>(common(i, i)) + common(j, j) - both;
      score += both / (either + 1e-7);
    }
    scores[i] = score;
    best = max(best, score);
  }
  best = block_reduce<kVoteWarps>(best, Most());
  int32_t first = INT_MAX;
  for (int32_t i = thread; i < n; i += 32 * kVoteWarps) {
    if (scores[i] == best) first = min(first, i);
  }
  first = block_reduce<kVoteWarps>(first, Least());
  if (thread == 0) winner[image] = n ? first : -1;
}

}  // namespace

void vote_masks(const TensorView& masks, const TensorView& offsets, const TensorView& shapes, const TensorView& winner,
                const TensorView& kept, const TensorView& reasons, const TensorView& scores,
                const TensorView& workspace, Stream stream) {
  const char* op = "vote_masks";
  const RaggedShape batch = expect_vote(masks, offsets, shapes, winner, kept, reasons, scores, Device::kCUDA);
  const auto n = static_cast<int32_t>(kept.shape[1]);
  const bool by_pixel = masks.ndim == 2;
  if (by_pixel) {
    expect(op, "masks", masks, DType::kBool, {-1, n}, Device::kCUDA);
  } else {
    expect(op, "masks", masks, DType::kBool, {-1}, Device::kCUDA);
  }
  const int32_t size = n + kBorders;
  expect(op, "workspace", workspace, DType::kInt32, {batch.count, size, size}, Device::kCUDA);
  const OnDevice device(winner);
  auto* pairs = workspace.as<int32_t>();
  if (n) {
    check(cudaMemsetAsync(pairs, 0, sizeof(*pairs) * workspace.size(), static_cast<cudaStream_t>(stream.handle)));
    for_each_group(batch, [&](const Images& group, int64_t) {
      const DividedImages images(group);
      for (int32_t rows = 0; rows < size; rows += kGroup) {
        for (int32_t columns = rows; columns < size; columns += kGroup) {
          launch(by_pixel ? intersect<true> : intersect<false>, images.blocks[images.count], dim3(kGroup, kWarps),
                 stream, images, {masks.as<uint8_t>(), n}, rows, columns, pairs);
        }
      }
    });
  }
  launch(elect, batch.count, 32 * kVoteWarps, stream, n, pairs, winner.as<int32_t>(), kept.as<uint8_t>(),
         reasons.as<uint8_t>(), scores.as<double>());
}

}  // namespace namedmask::cuda
