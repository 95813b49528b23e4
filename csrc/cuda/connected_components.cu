// SPDX-License-Identifier: MIT
// Label equivalence with union-find on the pixels of a photo, after Playne and Hawick (IEEE TPDS 2018), with the
// horizontal runs of Hennequin et al. (DASIP 2018): a warp sees 32 pixels of a row as one word, so a pixel's run is
// found by bit tricks and only one pixel of each contact between two runs unites them.
//
//   label_tiles   every 32 x 32 tile on its own, in shared memory
//   unite_tiles   across the seams between tiles
// and then, for the labels, rank_roots -> add_ranks -> paint.
//
// A node's parent is never greater than the node, and a union hangs the greater root under the smaller one by an
// atomic minimum: whatever the order of the threads, the root of a component is its first pixel in raster order.
#include <algorithm>
#include <climits>

#include "launch.h"
#include "namedmask/connected_components.h"

namespace namedmask::cuda {
namespace {

constexpr int kTile = 32;        // a tile's row is one ballot
constexpr int kTileWarps = 8;    // warps that share a tile, rows in turn
constexpr int kChunk = 1024;     // pixels in raster order that a block ranks together
constexpr int kMaxPhotos = 200;  // per launch: the table below must fit the 4 kB of a kernel's arguments
constexpr unsigned kAll = 0xffffffffu;

// Nodes of a photo: 0 is the outside (only fill_holes unites anything with it), pixel i is i + 1. A node's value is its
// parent, or kUnlabelled, or, from rank_roots on, kFirstRank - rank for a root.
constexpr int32_t kUnlabelled = -1;
constexpr int32_t kFirstRank = -2;

// The photos of one launch. It travels as a kernel argument: no copy to the device, nothing to keep alive, and the
// launch stays asynchronous (and can be captured in a CUDA graph). Larger batches are launched in groups.
struct Photos {
  int32_t first = 0, count = 0;    // photos first .. first + count of the batch
  int32_t begin[kMaxPhotos] = {};  // row of the photo's first pixel
  int32_t height[kMaxPhotos] = {}, width[kMaxPhotos] = {};
  int32_t tiles[kMaxPhotos + 1] = {};   // tiles of the photos before this one
  int32_t chunks[kMaxPhotos + 1] = {};  // chunks of the photos before this one
};

struct Photo {
  int32_t index, begin, height, width;
  int32_t block;  // the tile or chunk of this photo that the thread block works on

  __device__ int32_t left() const { return block % ((width + kTile - 1) / kTile) * kTile; }
  __device__ int32_t top() const { return block / ((width + kTile - 1) / kTile) * kTile; }
  __device__ int32_t chunk_pixel() const { return block * kChunk + static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t* nodes(int32_t* all) const { return all + begin + index; }  // one node more than pixels each
};

// The photo that this thread block belongs to, given the blocks of the photos before each.
__device__ Photo my_photo(const Photos& photos, const int32_t* blocks) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = photos.count - 1;  // the last photo whose first block is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (blocks[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {photos.first + low, photos.begin[low], photos.height[low], photos.width[low], block - blocks[low]};
}

// Bits below `lane`.
__device__ unsigned below(unsigned lane) { return (1u << lane) - 1; }

// The first bits of the runs of ones in a word.
__device__ unsigned run_begins(unsigned bits) { return bits & ~(bits << 1); }

// The root of a node's tree. Other threads may be uniting meanwhile: a value read late is still an ancestor.
__device__ int32_t root(const volatile int32_t* nodes, int32_t node) {
  for (int32_t parent = nodes[node]; parent != node && parent >= 0; parent = nodes[node]) node = parent;
  return node;
}

__device__ void unite(int32_t* nodes, int32_t a, int32_t b) {
  while (true) {
    a = root(nodes, a);
    b = root(nodes, b);
    if (a == b) return;
    const int32_t low = min(a, b), high = max(a, b);
    const int32_t parent = atomicMin(&nodes[high], low);
    if (parent == high) return;
    // Someone hung `high` elsewhere first; the minimum has kept one of both links, the other is made now.
    a = parent;
    b = low;
  }
}

// Labels pixels equal to `value` within each tile; a node's parent is its tile component's first pixel.
__global__ void label_tiles(const __grid_constant__ Photos photos, const uint8_t* mask, bool value,
                            int32_t* all_nodes) {
  __shared__ int32_t tile[kTile * kTile];
  __shared__ unsigned words[kTile];
  const Photo photo = my_photo(photos, photos.tiles);
  int32_t* nodes = photo.nodes(all_nodes);
  const auto lane = static_cast<int32_t>(threadIdx.x), warp = static_cast<int32_t>(threadIdx.y);
  const int32_t x = photo.left() + lane, top = photo.top();
  for (int32_t r = warp; r < kTile; r += kTileWarps) {
    const int32_t y = top + r;
    const bool set = x < photo.width && y < photo.height && (mask[photo.begin + y * photo.width + x] != 0) == value;
    const unsigned word = __ballot_sync(kAll, set);
    if (lane == 0) words[r] = word;
    tile[r * kTile + lane] = r * kTile + (32 - __clz(static_cast<int>(~word & below(lane))));  // its run's first pixel
  }
  __syncthreads();
  for (int32_t r = warp == 0 ? kTileWarps : warp; r < kTile; r += kTileWarps) {
    const int32_t here = r * kTile + lane;
    if (run_begins(words[r] & words[r - 1]) >> lane & 1) unite(tile, here, here - kTile);
  }
  __syncthreads();
  for (int32_t r = warp; r < kTile; r += kTileWarps) {
    const int32_t y = top + r;
    if (x >= photo.width || y >= photo.height) continue;
    const int32_t first = root(tile, r * kTile + lane);
    const int32_t parent = (top + first / kTile) * photo.width + photo.left() + first % kTile + 1;
    nodes[y * photo.width + x + 1] = words[r] >> lane & 1 ? parent : kUnlabelled;
  }
  if (photo.block == 0 && lane == 0 && warp == 0) nodes[0] = 0;
}

// Unites across the upper (threadIdx.y == 0) and the left (1) side of each tile; with `outside`, also what touches the
// photo's border with node 0, for which the lower (2) and the right side (3) are looked at too.
__global__ void unite_tiles(const __grid_constant__ Photos photos, bool outside, int32_t* all_nodes) {
  const Photo photo = my_photo(photos, photos.tiles);
  int32_t* nodes = photo.nodes(all_nodes);
  const auto i = static_cast<int32_t>(threadIdx.x);
  const unsigned side = threadIdx.y;
  const bool along_row = side % 2 == 0;
  const int32_t w = photo.width, h = photo.height;
  int32_t x = photo.left(), y = photo.top();
  if (side == 2) y = min(y + kTile, h) - 1;
  if (side == 3) x = min(x + kTile, w) - 1;
  (along_row ? x : y) += i;
  if (x >= w || y >= h) return;

  const bool border = side == 0 ? y == 0 : side == 1 ? x == 0 : side == 2 ? y == h - 1 : x == w - 1;
  if (border ? !outside : side >= 2) return;
  const int32_t here = y * w + x + 1;
  const int32_t there = border ? 0 : along_row ? here - w : here - 1;
  // Neighbours along a side lie in one component of the tile already: the first contact of a run speaks for all.
  const auto contact = [&](int32_t back) {
    return nodes[here - back] != kUnlabelled && (border || nodes[there - back] != kUnlabelled);
  };
  if (contact(0) && (i == 0 || !contact(along_row ? 1 : w))) unite(nodes, here, there);
}

// Points every node straight at its root, gives the roots of each chunk ranks 0, 1, ... in raster order and counts
// them.
__global__ void rank_roots(const __grid_constant__ Photos photos, int32_t* all_nodes, int32_t* chunk_roots) {
  __shared__ int32_t warp_roots[kChunk / 32];
  const Photo photo = my_photo(photos, photos.chunks);
  int32_t* nodes = photo.nodes(all_nodes);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t pixel = photo.chunk_pixel(), node = pixel + 1;
  const bool labelled = pixel < photo.height * photo.width && nodes[node] != kUnlabelled;
  const int32_t first = labelled ? root(nodes, node) : kUnlabelled;
  const unsigned word = __ballot_sync(kAll, first == node);
  if (lane == 0) warp_roots[warp] = __popc(word);
  __syncthreads();
  int32_t before = 0;
  for (unsigned v = 0; v < warp; ++v) before += warp_roots[v];
  const int32_t rank = before + __popc(word & below(lane));
  // Threads of other blocks may be walking through these nodes: `root` stops at a ranked root as at any other.
  if (labelled) nodes[node] = first == node ? kFirstRank - rank : first;
  if (threadIdx.x == kChunk - 1) chunk_roots[blockIdx.x] = rank + (first == node);
}

// One warp per photo: the roots of each chunk -> the roots of the chunks before it, and the photo's total.
__global__ void add_ranks(const __grid_constant__ Photos photos, int32_t* chunk_roots, int32_t* counts) {
  const auto b = static_cast<int32_t>(blockIdx.x), lane = static_cast<int32_t>(threadIdx.x);
  const int32_t begin = photos.chunks[b], end = photos.chunks[b + 1];
  const int32_t per_lane = (end - begin + 31) / 32;
  const int32_t mine = min(begin + lane * per_lane, end), mine_end = min(mine + per_lane, end);
  int32_t sum = 0;
  for (int32_t c = mine; c < mine_end; ++c) sum += chunk_roots[c];
  int32_t upto = sum;
  for (int32_t step = 1; step < 32; step *= 2) {
    const int32_t left = __shfl_up_sync(kAll, upto, step);
    if (lane >= step) upto += left;
  }
  if (lane == 31) counts[photos.first + b] = upto;
  int32_t before = upto - sum;
  for (int32_t c = mine; c < mine_end; ++c) {
    const int32_t roots = chunk_roots[c];
    chunk_roots[c] = before;
    before += roots;
  }
}

__global__ void paint(const __grid_constant__ Photos photos, const int32_t* chunk_first, int32_t* all_nodes,
                      int32_t* labels) {
  const Photo photo = my_photo(photos, photos.chunks);
  const int32_t* nodes = photo.nodes(all_nodes);
  const int32_t pixel = photo.chunk_pixel();
  if (pixel >= photo.height * photo.width) return;
  int32_t label = 0;
  if (const int32_t parent = nodes[pixel + 1]; parent != kUnlabelled) {
    const int32_t first = parent < 0 ? pixel + 1 : parent;
    const int32_t chunk = static_cast<int32_t>(blockIdx.x) - photo.block + (first - 1) / kChunk;
    label = chunk_first[chunk] + (kFirstRank - nodes[first]) + 1;
  }
  labels[photo.begin + pixel] = label;
}

// Points every node straight at its root and adds the pixels of each component up in area[root].
__global__ void add_areas(const __grid_constant__ Photos photos, int32_t* all_nodes, int32_t* all_areas) {
  const Photo photo = my_photo(photos, photos.tiles);
  int32_t *nodes = photo.nodes(all_nodes), *areas = photo.nodes(all_areas);
  const unsigned lane = threadIdx.x;
  const int32_t x = photo.left() + static_cast<int32_t>(lane);
  for (int32_t r = static_cast<int32_t>(threadIdx.y); r < kTile; r += kTileWarps) {
    const int32_t y = photo.top() + r, node = y * photo.width + x + 1;
    const bool set = x < photo.width && y < photo.height && nodes[node] != kUnlabelled;
    const unsigned word = __ballot_sync(kAll, set);
    int32_t first = 0;
    if (run_begins(word) >> lane & 1) {
      first = root(nodes, node);
      const int past = __ffs(static_cast<int>(~(word >> lane)));  // 1 + the run's length; 0: it fills the word
      atomicAdd(&areas[first], past ? past - 1 : 32);
    }
    first = __shfl_sync(kAll, first, 32 - __clz(static_cast<int>(~word & below(lane))));
    if (set) nodes[node] = first;
  }
}

// best[photo] = the greatest (area, first pixel before last pixel) of its components.
__global__ void pick_largest(const __grid_constant__ Photos photos, int32_t* all_nodes, int32_t* all_areas,
                             unsigned long long* best) {
  const Photo photo = my_photo(photos, photos.chunks);
  const int32_t node = photo.chunk_pixel() + 1;
  if (node > photo.height * photo.width || photo.nodes(all_nodes)[node] != node) return;
  const auto area = static_cast<unsigned long long>(photo.nodes(all_areas)[node]);
  const unsigned long long key = area << 32 | (kAll - static_cast<unsigned>(node));
  // It only grows, so a look at an old value never skips a winner, and saves most of the atomics.
  if (key > *const_cast<volatile unsigned long long*>(&best[photo.index])) atomicMax(&best[photo.index], key);
}

__global__ void keep_largest(const __grid_constant__ Photos photos, int32_t* all_nodes, const unsigned long long* best,
                             uint8_t* out) {
  const Photo photo = my_photo(photos, photos.chunks);
  const int32_t pixel = photo.chunk_pixel();
  if (pixel >= photo.height * photo.width) return;
  const auto winner = static_cast<int32_t>(kAll - static_cast<unsigned>(best[photo.index]));
  const int32_t parent = photo.nodes(all_nodes)[pixel + 1];
  out[photo.begin + pixel] = parent != kUnlabelled && parent == winner;
}

// The background that is not united with the outside, and the mask.
__global__ void keep_inside(const __grid_constant__ Photos photos, int32_t* all_nodes, uint8_t* out) {
  const Photo photo = my_photo(photos, photos.chunks);
  const int32_t pixel = photo.chunk_pixel();
  if (pixel >= photo.height * photo.width) return;
  const int32_t* nodes = photo.nodes(all_nodes);
  out[photo.begin + pixel] = nodes[pixel + 1] == kUnlabelled || root(nodes, pixel + 1) != 0;
}

__global__ void start_stats(int32_t n, int32_t* areas, int32_t* boxes) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  areas[i] = 0;
  boxes[4 * i] = boxes[4 * i + 1] = INT_MAX;
  boxes[4 * i + 2] = boxes[4 * i + 3] = 0;
}

// Areas, and boxes as x, y and the first column and row past the component.
__global__ void add_stats(const __grid_constant__ Photos photos, const int32_t* labels, const int32_t* counts,
                          int32_t* areas, int32_t* boxes) {
  __shared__ int32_t first;  // components of the photos before this one
  const Photo photo = my_photo(photos, photos.tiles);
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int32_t x = photo.left() + lane;
  if (lane == 0 && threadIdx.y == 0) first = 0;
  __syncthreads();
  for (auto b = static_cast<int32_t>(threadIdx.y) * kTile + lane; b < photo.index; b += kTile * kTileWarps) {
    atomicAdd(&first, counts[b]);
  }
  __syncthreads();
  const auto lower = [](int32_t* bound, int32_t value) {  // as in pick_largest: a look first saves most atomics
    if (value < *const_cast<volatile int32_t*>(bound)) atomicMin(bound, value);
  };
  const auto raise = [](int32_t* bound, int32_t value) {
    if (value > *const_cast<volatile int32_t*>(bound)) atomicMax(bound, value);
  };
  for (int32_t r = static_cast<int32_t>(threadIdx.y); r < kTile; r += kTileWarps) {
    const int32_t y = photo.top() + r;
    const bool inside = x < photo.width && y < photo.height;
    const int32_t label = inside ? labels[photo.begin + y * photo.width + x] : 0;
    const int32_t left = __shfl_up_sync(kAll, label, 1);
    const bool begins = lane == 0 || label != left;
    const unsigned next = __ballot_sync(kAll, begins) & ~(below(lane) << 1 | 1);
    if (!begins || label == 0) continue;  // no collective follows in this turn, and lanes meet again at the next
    const int32_t length = (next ? __ffs(static_cast<int>(next)) - 1 : 32) - lane;
    const int32_t component = first + label - 1;
    atomicAdd(&areas[component], length);
    lower(&boxes[4 * component], x);
    lower(&boxes[4 * component + 1], y);
    raise(&boxes[4 * component + 2], x + length);
    raise(&boxes[4 * component + 3], y + 1);
  }
}

__global__ void finish_boxes(int32_t n, int32_t* boxes) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  boxes[4 * i + 2] -= boxes[4 * i];
  boxes[4 * i + 3] -= boxes[4 * i + 1];
}

const dim3 kTileThreads(kTile, kTileWarps);

// Calls f(photos) for groups of photos that fit a launch.
template <class F>
void for_each_group(const RaggedShape& batch, F f) {
  for (int64_t first = 0; first < batch.count; first += kMaxPhotos) {
    Photos photos;
    photos.first = static_cast<int32_t>(first);
    photos.count = static_cast<int32_t>(std::min<int64_t>(kMaxPhotos, batch.count - first));
    for (int32_t i = 0; i < photos.count; ++i) {
      const int64_t h = batch.height(first + i), w = batch.width(first + i);
      const int64_t tiles = ((h + kTile - 1) / kTile) * ((w + kTile - 1) / kTile);
      photos.begin[i] = static_cast<int32_t>(batch.begin(first + i));
      photos.height[i] = static_cast<int32_t>(h);
      photos.width[i] = static_cast<int32_t>(w);
      photos.tiles[i + 1] = photos.tiles[i] + static_cast<int32_t>(h * w > 0 ? tiles : 0);
      photos.chunks[i + 1] = photos.chunks[i] + static_cast<int32_t>((h * w + kChunk - 1) / kChunk);
    }
    f(photos, photos.tiles[photos.count], photos.chunks[photos.count]);
  }
}

// The scratch memory of a call, cut up.
struct Workspace {
  Workspace(const char* op, const TensorView& workspace, int64_t rows, int64_t photos) {
    expect(op, "workspace", workspace, DType::kInt32, {2 * rows + 4 * photos}, Device::kCUDA);
    best = workspace.as<unsigned long long>();
    nodes = workspace.as<int32_t>() + 2 * photos;
    second = nodes + rows + photos;
  }
  unsigned long long* best;  // [B]
  int32_t* nodes;            // [P + B]
  int32_t* second;           // [P + B]: areas of roots, or roots of chunks
};

void check_masks(const char* op, const TensorView& mask, const TensorView& out) {
  expect(op, "mask", mask, DType::kBool, {-1}, Device::kCUDA);
  expect(op, "out", out, DType::kBool, {mask.shape[0]}, Device::kCUDA);
}

}  // namespace

void connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                          const TensorView& labels, const TensorView& counts, const TensorView& workspace,
                          Stream stream) {
  const char* op = "connected_components";
  expect(op, "mask", mask, DType::kBool, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "labels", labels, DType::kInt32, {mask.shape[0]}, Device::kCUDA);
  expect(op, "counts", counts, DType::kInt32, {batch.count}, Device::kCUDA);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  for_each_group(batch, [&](const Photos& photos, int64_t tiles, int64_t chunks) {
    launch(label_tiles, tiles, kTileThreads, stream, photos, mask.as<uint8_t>(), true, work.nodes);
    launch(unite_tiles, tiles, dim3(kTile, 2), stream, photos, false, work.nodes);
    launch(rank_roots, chunks, kChunk, stream, photos, work.nodes, work.second);
    launch(add_ranks, photos.count, 32, stream, photos, work.second, counts.as<int32_t>());
    launch(paint, chunks, kChunk, stream, photos, work.second, work.nodes, labels.as<int32_t>());
  });
}

void component_stats(const TensorView& labels, const TensorView& offsets, const TensorView& shapes,
                     const TensorView& counts, const TensorView& areas, const TensorView& boxes, Stream stream) {
  const char* op = "component_stats";
  expect(op, "labels", labels, DType::kInt32, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, labels.shape[0]);
  expect(op, "counts", counts, DType::kInt32, {batch.count}, Device::kCUDA);
  expect(op, "areas", areas, DType::kInt32, {-1}, Device::kCUDA);
  expect(op, "boxes", boxes, DType::kInt32, {areas.shape[0], 4}, Device::kCUDA);
  const OnDevice device(labels);
  const auto n = static_cast<int32_t>(areas.shape[0]);
  const int64_t blocks = (areas.shape[0] + 255) / 256;
  launch(start_stats, blocks, 256, stream, n, areas.as<int32_t>(), boxes.as<int32_t>());
  for_each_group(batch, [&](const Photos& photos, int64_t tiles, int64_t) {
    launch(add_stats, tiles, kTileThreads, stream, photos, labels.as<int32_t>(), counts.as<int32_t>(),
           areas.as<int32_t>(), boxes.as<int32_t>());
  });
  launch(finish_boxes, blocks, 256, stream, n, boxes.as<int32_t>());
}

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, const TensorView& workspace, Stream stream) {
  const char* op = "largest_component";
  check_masks(op, mask, out);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  check(cudaMemsetAsync(work.best, 0, sizeof(*work.best) * batch.count, handle));
  check(cudaMemsetAsync(work.second, 0, sizeof(*work.second) * (mask.shape[0] + batch.count), handle));
  for_each_group(batch, [&](const Photos& photos, int64_t tiles, int64_t chunks) {
    launch(label_tiles, tiles, kTileThreads, stream, photos, mask.as<uint8_t>(), true, work.nodes);
    launch(unite_tiles, tiles, dim3(kTile, 2), stream, photos, false, work.nodes);
    launch(add_areas, tiles, kTileThreads, stream, photos, work.nodes, work.second);
    launch(pick_largest, chunks, kChunk, stream, photos, work.nodes, work.second, work.best);
    launch(keep_largest, chunks, kChunk, stream, photos, work.nodes, work.best, out.as<uint8_t>());
  });
}

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                const TensorView& workspace, Stream stream) {
  const char* op = "fill_holes";
  check_masks(op, mask, out);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  for_each_group(batch, [&](const Photos& photos, int64_t tiles, int64_t chunks) {
    launch(label_tiles, tiles, kTileThreads, stream, photos, mask.as<uint8_t>(), false, work.nodes);
    launch(unite_tiles, tiles, dim3(kTile, 4), stream, photos, true, work.nodes);
    launch(keep_inside, chunks, kChunk, stream, photos, work.nodes, out.as<uint8_t>());
  });
}

}  // namespace namedmask::cuda
