// SPDX-License-Identifier: MIT
// Label equivalence with union-find on the pixels of an image, after Playne and Hawick (IEEE TPDS 2018), with the
// horizontal runs of Hennequin et al. (DASIP 2018): a warp holds 32 pixels of a row as one word, so bit operations find
// the run of a pixel, and only one pixel of each contact between two runs merges them.
//
//   label_tiles   within every 32 x 32 tile, in shared memory
//   unite_tiles   across the borders between tiles
// and then, for the labels, rank_roots -> add_ranks -> paint.
//
// A node's parent is never greater than the node, and a union attaches the greater root to the smaller one with an
// atomic minimum: in any order of threads, the root of a component is its first pixel in raster order.
#include <climits>

#include "images.h"
#include "namedmask/connected_components.h"

namespace namedmask::cuda {
namespace {

constexpr int kTile = 32;      // one ballot per row of a tile
constexpr int kTileWarps = 8;  // warps per tile, with interleaved rows

// Nodes of an image: 0 is the outside (only fill_holes merges nodes with it), pixel i is node i + 1. The value of a
// node is its parent, or kUnlabeled, or for a root, from rank_roots on, kFirstRank - rank.
constexpr int32_t kUnlabeled = -1;
constexpr int32_t kFirstRank = -2;

struct TiledImages : Images {
  explicit TiledImages(const Images& images) : Images(images) {
    for (int32_t i = 0; i < count; ++i) {
      const int32_t across = (width[i] + kTile - 1) / kTile, down = (height[i] + kTile - 1) / kTile;
      tiles[i + 1] = tiles[i] + across * down;
    }
  }

  int32_t tiles[kMaxImages + 1] = {};  // number of tiles of the images before this one
};

__device__ int32_t tile_left(const Image& tile) { return tile.block % ((tile.width + kTile - 1) / kTile) * kTile; }
__device__ int32_t tile_top(const Image& tile) { return tile.block / ((tile.width + kTile - 1) / kTile) * kTile; }
__device__ int32_t* nodes_of(const Image& image, int32_t* all) { return all + image.begin + image.index; }

// The first bits of the runs of ones in a word.
__device__ unsigned run_begins(unsigned bits) { return bits & ~(bits << 1); }

// The root of a node's tree. Other threads may merge trees meanwhile: an outdated value is still an ancestor.
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
    // Another thread attached `high` first. The minimum has kept one of the two links; now make the other.
    a = parent;
    b = low;
  }
}

// Labels pixels equal to `value` within each tile; a node's parent is its tile component's first pixel. `kEight`: with
// 8-connectivity.
template <bool kEight>
__global__ void __launch_bounds__(kTile* kTileWarps)
    label_tiles(const __grid_constant__ TiledImages images, const uint8_t* mask, bool value, int32_t* all_nodes) {
  __shared__ int32_t tile[kTile * kTile];
  __shared__ unsigned words[kTile];
  const Image image = my_image(images, images.tiles);
  int32_t* nodes = nodes_of(image, all_nodes);
  const auto lane = static_cast<int32_t>(threadIdx.x), warp = static_cast<int32_t>(threadIdx.y);
  const int32_t x = tile_left(image) + lane, top = tile_top(image);
  for (int32_t r = warp; r < kTile; r += kTileWarps) {
    const int32_t y = top + r;
    const bool set = x < image.width && y < image.height && (mask[image.begin + y * image.width + x] != 0) == value;
    const unsigned word = __ballot_sync(kAllLanes, set);
    if (lane == 0) words[r] = word;
    tile[r * kTile + lane] =
        r * kTile + (32 - __clz(static_cast<int>(~word & below(lane))));  // the first pixel of its run
  }
  __syncthreads();
  for (int32_t r = warp == 0 ? kTileWarps : warp; r < kTile; r += kTileWarps) {
    const int32_t here = r * kTile + lane;
    if (run_begins(words[r] & words[r - 1]) >> lane & 1) unite(tile, here, here - kTile);
    if constexpr (kEight) {  // diagonal neighbors that have no other neighbor in common
      const unsigned own = words[r], above = words[r - 1], alone = own & ~above;
      if ((alone & above << 1 & ~(own << 1)) >> lane & 1) unite(tile, here, here - kTile - 1);
      if ((alone & above >> 1 & ~(own >> 1)) >> lane & 1) unite(tile, here, here - kTile + 1);
    }
  }
  __syncthreads();
  for (int32_t r = warp; r < kTile; r += kTileWarps) {
    const int32_t y = top + r;
    if (x >= image.width || y >= image.height) continue;
    const int32_t first = root(tile, r * kTile + lane);
    const int32_t parent = (top + first / kTile) * image.width + tile_left(image) + first % kTile + 1;
    nodes[y * image.width + x + 1] = words[r] >> lane & 1 ? parent : kUnlabeled;
  }
  if (image.block == 0 && lane == 0 && warp == 0) nodes[0] = 0;
}

// Merges across the upper (threadIdx.y == 0) and the left (1) side of each tile. With `outside`, also merges nodes at
// the image border with node 0, which includes the lower (2) and the right side (3). `kEight`: with 8-connectivity.
template <bool kEight>
__global__ void __launch_bounds__(4 * kTile)
    unite_tiles(const __grid_constant__ TiledImages images, bool outside, int32_t* all_nodes) {
  const Image image = my_image(images, images.tiles);
  int32_t* nodes = nodes_of(image, all_nodes);
  const auto i = static_cast<int32_t>(threadIdx.x);
  const unsigned side = threadIdx.y;
  const bool along_row = side % 2 == 0;
  const int32_t w = image.width, h = image.height;
  int32_t x = tile_left(image), y = tile_top(image);
  if (side == 2) y = min(y + kTile, h) - 1;
  if (side == 3) x = min(x + kTile, w) - 1;
  (along_row ? x : y) += i;
  if (x >= w || y >= h) return;

  const bool border = side == 0 ? y == 0 : side == 1 ? x == 0 : side == 2 ? y == h - 1 : x == w - 1;
  if (border ? !outside : side >= 2) return;
  const int32_t here = y * w + x + 1;
  const int32_t there = border ? 0 : along_row ? here - w : here - 1;
  // Neighbors along a side are already in one component of the tile: the first contact of a run is enough.
  const auto contact = [&](int32_t back) {
    return nodes[here - back] != kUnlabeled && (border || nodes[there - back] != kUnlabeled);
  };
  if (contact(0) && (i == 0 || !contact(along_row ? 1 : w))) unite(nodes, here, there);
  if constexpr (kEight) {
    if (border || nodes[here] == kUnlabeled || nodes[there] != kUnlabeled) return;
    const int32_t place = along_row ? x : y, step = along_row ? 1 : w;
    if (place > 0 && nodes[there - step] != kUnlabeled) unite(nodes, here, there - step);
    if (place + 1 < (along_row ? w : h) && nodes[there + step] != kUnlabeled) unite(nodes, here, there + step);
  }
}

// Sets the parent of every node to its root, ranks the roots of each chunk 0, 1, ... in raster order and counts them.
__global__ void __launch_bounds__(kChunk)
    rank_roots(const __grid_constant__ Images images, int32_t* all_nodes, int32_t* chunk_roots) {
  const Image image = my_image(images, images.chunks);
  int32_t* nodes = nodes_of(image, all_nodes);
  const int32_t pixel = image.chunk_item(), node = pixel + 1;
  const bool labeled = pixel < image.pixels() && nodes[node] != kUnlabeled;
  const int32_t first = labeled ? root(nodes, node) : kUnlabeled;
  const int32_t rank = rank_in_chunk(first == node, &chunk_roots[blockIdx.x]);
  // Threads of other blocks may traverse these nodes meanwhile: `root` stops at a ranked root like at any other.
  if (labeled) nodes[node] = first == node ? kFirstRank - rank : first;
}

__global__ void __launch_bounds__(kChunk)
    paint(const __grid_constant__ Images images, const int32_t* chunk_first, int32_t* all_nodes, int32_t* labels) {
  const Image image = my_image(images, images.chunks);
  const int32_t* nodes = nodes_of(image, all_nodes);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  int32_t label = 0;
  if (const int32_t parent = nodes[pixel + 1]; parent != kUnlabeled) {
    const int32_t first = parent < 0 ? pixel + 1 : parent;
    const int32_t chunk = static_cast<int32_t>(blockIdx.x) - image.block + (first - 1) / kChunk;
    label = chunk_first[chunk] + (kFirstRank - nodes[first]) + 1;
  }
  labels[image.begin + pixel] = label;
}

// Sets the parent of every node to its root and counts the pixels of each component in area[root].
__global__ void __launch_bounds__(kTile* kTileWarps)
    add_areas(const __grid_constant__ TiledImages images, int32_t* all_nodes, int32_t* all_areas) {
  const Image image = my_image(images, images.tiles);
  int32_t *nodes = nodes_of(image, all_nodes), *areas = nodes_of(image, all_areas);
  const unsigned lane = threadIdx.x;
  const int32_t x = tile_left(image) + static_cast<int32_t>(lane);
  for (int32_t r = static_cast<int32_t>(threadIdx.y); r < kTile; r += kTileWarps) {
    const int32_t y = tile_top(image) + r, node = y * image.width + x + 1;
    const bool set = x < image.width && y < image.height && nodes[node] != kUnlabeled;
    const unsigned word = __ballot_sync(kAllLanes, set);
    int32_t first = 0;
    if (run_begins(word) >> lane & 1) {
      first = root(nodes, node);
      const int past = __ffs(static_cast<int>(~(word >> lane)));  // 1 + the length of the run; 0: it fills the word
      atomicAdd(&areas[first], past ? past - 1 : 32);
    }
    first = __shfl_sync(kAllLanes, first, 32 - __clz(static_cast<int>(~word & below(lane))));
    if (set) nodes[node] = first;
  }
}

// best[image] = the largest component: the maximum area, then the smallest first pixel.
__global__ void __launch_bounds__(kChunk) pick_largest(const __grid_constant__ Images images, int32_t* all_nodes,
                                                       int32_t* all_areas, unsigned long long* best) {
  const Image image = my_image(images, images.chunks);
  const int32_t node = image.chunk_item() + 1;
  if (node > image.pixels() || nodes_of(image, all_nodes)[node] != node) return;
  const auto area = static_cast<unsigned long long>(nodes_of(image, all_areas)[node]);
  const unsigned long long key = area << 32 | ~static_cast<unsigned>(node);
  // It only grows: reading a possibly old value first never skips a winner and saves most of the atomics.
  if (key > *const_cast<volatile unsigned long long*>(&best[image.index])) atomicMax(&best[image.index], key);
}

__global__ void __launch_bounds__(kChunk) keep_largest(const __grid_constant__ Images images, int32_t* all_nodes,
                                                       const unsigned long long* best, uint8_t* out) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const auto winner = static_cast<int32_t>(~static_cast<unsigned>(best[image.index]));
  const int32_t parent = nodes_of(image, all_nodes)[pixel + 1];
  out[image.begin + pixel] = parent != kUnlabeled && parent == winner;
}

// The mask plus the background that is not merged with the outside.
__global__ void __launch_bounds__(kChunk)
    keep_inside(const __grid_constant__ Images images, int32_t* all_nodes, uint8_t* out) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const int32_t* nodes = nodes_of(image, all_nodes);
  out[image.begin + pixel] = nodes[pixel + 1] == kUnlabeled || root(nodes, pixel + 1) != 0;
}

__global__ void __launch_bounds__(kChunk)
    keep_seeded(const __grid_constant__ Images images, const int32_t* seeds, int32_t* all_nodes, uint8_t* out) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const int32_t* nodes = nodes_of(image, all_nodes);
  const int32_t seed = seeds[image.index];
  const bool labeled = seed >= 0 && nodes[seed + 1] != kUnlabeled && nodes[pixel + 1] != kUnlabeled;
  out[image.begin + pixel] = labeled && root(nodes, pixel + 1) == root(nodes, seed + 1);
}

__global__ void __launch_bounds__(256) start_stats(int32_t n, int32_t* areas, int32_t* boxes) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  areas[i] = 0;
  boxes[4 * i] = boxes[4 * i + 1] = INT_MAX;
  boxes[4 * i + 2] = boxes[4 * i + 3] = 0;
}

// Areas, and boxes as x, y and the first column and row beyond the component.
__global__ void __launch_bounds__(kTile* kTileWarps)
    add_stats(const __grid_constant__ TiledImages images, const int32_t* labels, const int32_t* counts, int32_t* areas,
              int32_t* boxes) {
  __shared__ int32_t first;  // number of components of the images before this one
  const Image image = my_image(images, images.tiles);
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int32_t x = tile_left(image) + lane;
  if (lane == 0 && threadIdx.y == 0) first = 0;
  __syncthreads();
  for (auto b = static_cast<int32_t>(threadIdx.y) * kTile + lane; b < image.index; b += kTile * kTileWarps) {
    atomicAdd(&first, counts[b]);
  }
  __syncthreads();
  const auto lower = [](int32_t* bound, int32_t value) {  // as in pick_largest: reading first saves most atomics
    if (value < *const_cast<volatile int32_t*>(bound)) atomicMin(bound, value);
  };
  const auto raise = [](int32_t* bound, int32_t value) {
    if (value > *const_cast<volatile int32_t*>(bound)) atomicMax(bound, value);
  };
  for (int32_t r = static_cast<int32_t>(threadIdx.y); r < kTile; r += kTileWarps) {
    const int32_t y = tile_top(image) + r;
    const bool inside = x < image.width && y < image.height;
    const int32_t label = inside ? labels[image.begin + y * image.width + x] : 0;
    const int32_t left = __shfl_up_sync(kAllLanes, label, 1);
    const bool begins = lane == 0 || label != left;
    const unsigned next = __ballot_sync(kAllLanes, begins) & ~(below(lane) << 1 | 1);
    if (!begins || label == 0) continue;  // no collective follows in this iteration, and lanes reconverge at the next
    const int32_t length = (next ? __ffs(static_cast<int>(next)) - 1 : 32) - lane;
    const int32_t component = first + label - 1;
    atomicAdd(&areas[component], length);
    lower(&boxes[4 * component], x);
    lower(&boxes[4 * component + 1], y);
    raise(&boxes[4 * component + 2], x + length);
    raise(&boxes[4 * component + 3], y + 1);
  }
}

__global__ void __launch_bounds__(256) finish_boxes(int32_t n, int32_t* boxes) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  boxes[4 * i + 2] -= boxes[4 * i];
  boxes[4 * i + 3] -= boxes[4 * i + 1];
}

const dim3 kTileThreads(kTile, kTileWarps);

// Merges the pixels equal to `value` of each component, and with `outside` those at the image border with node 0.
void label(const TiledImages& images, int64_t tiles, const TensorView& mask, bool value, bool outside,
           int64_t connectivity, int32_t* nodes, Stream stream) {
  const bool eight = connectivity == 8;
  launch(eight ? label_tiles<true> : label_tiles<false>, tiles, kTileThreads, stream, images, mask.as<uint8_t>(), value,
         nodes);
  launch(eight ? unite_tiles<true> : unite_tiles<false>, tiles, dim3(kTile, outside ? 4 : 2), stream, images, outside,
         nodes);
}

// Calls f(images, tiles, chunks) for groups of images that fit one launch.
template <class F>
void for_each_tiled_group(const RaggedShape& batch, F f) {
  for_each_group(batch, [&](const Images& group, int64_t chunks) {
    const TiledImages images(group);
    f(images, images.tiles[images.count], chunks);
  });
}

// The parts of the scratch memory of a call.
struct Workspace {
  Workspace(const char* op, const TensorView& workspace, int64_t rows, int64_t images) {
    expect(op, "workspace", workspace, DType::kInt32, {2 * rows + 4 * images}, Device::kCUDA);
    best = workspace.as<unsigned long long>();
    nodes = workspace.as<int32_t>() + 2 * images;
    second = nodes + rows + images;
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
                          int64_t connectivity, Stream stream) {
  const char* op = "connected_components";
  expect(op, "mask", mask, DType::kBool, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "labels", labels, DType::kInt32, {mask.shape[0]}, Device::kCUDA);
  expect(op, "counts", counts, DType::kInt32, {batch.count}, Device::kCUDA);
  expect_connectivity(op, connectivity);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  for_each_tiled_group(batch, [&](const TiledImages& images, int64_t tiles, int64_t chunks) {
    label(images, tiles, mask, true, false, connectivity, work.nodes, stream);
    launch(rank_roots, chunks, kChunk, stream, images, work.nodes, work.second);
    launch(add_ranks, images.count, 32, stream, images, work.second, counts.as<int32_t>());
    launch(paint, chunks, kChunk, stream, images, work.second, work.nodes, labels.as<int32_t>());
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
  for_each_tiled_group(batch, [&](const TiledImages& images, int64_t tiles, int64_t) {
    launch(add_stats, tiles, kTileThreads, stream, images, labels.as<int32_t>(), counts.as<int32_t>(),
           areas.as<int32_t>(), boxes.as<int32_t>());
  });
  launch(finish_boxes, blocks, 256, stream, n, boxes.as<int32_t>());
}

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, const TensorView& workspace, int64_t connectivity, Stream stream) {
  const char* op = "largest_component";
  check_masks(op, mask, out);
  expect_connectivity(op, connectivity);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  check(cudaMemsetAsync(work.best, 0, sizeof(*work.best) * batch.count, handle));
  check(cudaMemsetAsync(work.second, 0, sizeof(*work.second) * (mask.shape[0] + batch.count), handle));
  for_each_tiled_group(batch, [&](const TiledImages& images, int64_t tiles, int64_t chunks) {
    label(images, tiles, mask, true, false, connectivity, work.nodes, stream);
    launch(add_areas, tiles, kTileThreads, stream, images, work.nodes, work.second);
    launch(pick_largest, chunks, kChunk, stream, images, work.nodes, work.second, work.best);
    launch(keep_largest, chunks, kChunk, stream, images, work.nodes, work.best, out.as<uint8_t>());
  });
}

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                const TensorView& workspace, int64_t connectivity, Stream stream) {
  const char* op = "fill_holes";
  check_masks(op, mask, out);
  expect_connectivity(op, connectivity);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  for_each_tiled_group(batch, [&](const TiledImages& images, int64_t tiles, int64_t chunks) {
    label(images, tiles, mask, false, true, connectivity, work.nodes, stream);
    launch(keep_inside, chunks, kChunk, stream, images, work.nodes, out.as<uint8_t>());
  });
}

void seeded_component(const TensorView& mask, const TensorView& seeds, const TensorView& offsets,
                      const TensorView& shapes, const TensorView& out, const TensorView& workspace,
                      int64_t connectivity, Stream stream) {
  const char* op = "seeded_component";
  check_masks(op, mask, out);
  expect_connectivity(op, connectivity);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "seeds", seeds, DType::kInt32, {batch.count}, Device::kCUDA);
  const Workspace work(op, workspace, mask.shape[0], batch.count);
  const OnDevice device(mask);
  for_each_tiled_group(batch, [&](const TiledImages& images, int64_t tiles, int64_t chunks) {
    label(images, tiles, mask, true, false, connectivity, work.nodes, stream);
    launch(keep_seeded, chunks, kChunk, stream, images, seeds.as<int32_t>(), work.nodes, out.as<uint8_t>());
  });
}

}  // namespace namedmask::cuda
