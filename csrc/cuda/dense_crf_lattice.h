// SPDX-License-Identifier: MIT
// dense_crf's permutohedral lattice on the device. Images are processed in tiles of 16 x 16 pixels. Corner r of a
// pixel's simplex is an entry: a weight and a vertex, which is stored as its number among the vertices of the tile,
// 70 to 300 of them for the 1,536 entries of a tile in a photo. A thread block keeps the values of its tile's vertices
// in shared memory, and adds their sums to those of the whole image once.
//
// Sums are integers in fixed point, so that neither the order of additions nor the numbers of the vertices, which
// depend on the order in which threads run, change a result.
#pragma once

#include <utility>

#include "channels.h"
#include "hash_table.h"
#include "images.h"
#include "permutohedral.h"

namespace namedmask::cuda {
namespace {

constexpr int kCorners = kLatticeCorners, kAxes = kLatticeAxes;
constexpr int kSide = 16, kTilePixels = kSide * kSide, kTileEntries = kCorners * kTilePixels;
constexpr int kTileSlots = 2048;  // of the hash table of a tile
constexpr int kJoinThreads = 64;  // few vertices are first seen in a tile
static_assert(kTileSlots > kTileEntries);

typedef unsigned long long Fixed;  // a signed sum, as atomicAdd takes it

// Sums over an image are multiples of 2^-35. The largest is the sum of the weights of all pixels: below 2^28.
constexpr int kSumBits = 35;

// The workspace of the first call.
constexpr int64_t kWorkspace = 37;  // int32 per pixel

struct Corners {
  Corners(const TensorView& workspace, int64_t pixels) {
    auto* next = workspace.as<int32_t>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    keys = reinterpret_cast<LatticeKey*>(take(2 * kSlots * pixels));
    numbers = take(kSlots * pixels);
    list = take(kCorners * pixels);
    listed = take(pixels);
    weights = reinterpret_cast<float*>(take(kCorners * pixels));
    local = reinterpret_cast<uint16_t*>(next);
  }

  void clear(int64_t pixels, Stream stream) const {
    check(cudaMemsetAsync(keys, 0xff, sizeof(LatticeKey) * kSlots * pixels, static_cast<cudaStream_t>(stream.handle)));
  }

  static constexpr int kSlots = kCorners + 1;  // of the hash table of an image, per pixel

  LatticeKey* keys;  // [7 P]: a hash table of the vertices of each image
  int32_t* numbers;  // [7 P]: of the vertex in a slot, within its image
  int32_t* list;  // [6 P]: from a tile's first entry, its vertices; until they are joined, their slots, ~slot if first
                  // seen there
  int32_t* listed;  // [P]: their number, at the tile's first pixel
  float* weights;   // [6 P]: tile by tile [6, pixels]; `normalize` multiplies them by the pixel's norm
  uint16_t* local;  // [6 P]: place in the tile's list, ordered like the weights
};

// A tile of an image, smaller at the right and the bottom, for a block of kTilePixels threads. Threads are pixels of a
// whole tile in raster order.
struct Tile {
  __device__ explicit Tile(const Image& image) {
    const int32_t across = (image.width + kSide - 1) / kSide;
    top = image.block / across * kSide;
    left = (image.block - image.block / across * across) * kSide;
    rows = min(kSide, image.height - top);
    columns = min(kSide, image.width - left);
    width = image.width;
    begin = image.begin + top * width + left;
    first = image.begin + top * width + left * rows;
  }

  static __device__ int32_t row(int32_t pixel) { return static_cast<int32_t>(static_cast<unsigned>(pixel) / kSide); }
  static __device__ int32_t column(int32_t pixel) { return pixel & (kSide - 1); }
  __device__ bool has(int32_t pixel) const { return row(pixel) < rows && column(pixel) < columns; }
  // The row of the pixel in arrays of all images.
  __device__ int32_t place(int32_t pixel) const { return begin + row(pixel) * width + column(pixel); }
  __device__ int32_t entry(int32_t pixel, int corner) const {
    return kCorners * first + (corner * rows + row(pixel)) * columns + column(pixel);
  }

  int32_t top, left, rows, columns;
  int32_t width, begin;  // of the image; its pixels before the tile's first
  int32_t first;         // number of pixels of the batch in the tiles before this one
};

// The same images with `chunks` counting tiles.
template <class T>
T with_tiles(T images) {
  const auto along = [](int64_t pixels) { return (pixels + kSide - 1) / kSide; };
  for (int32_t i = 0; i < images.count; ++i) {
    images.chunks[i + 1] = images.chunks[i] + static_cast<int32_t>(along(images.height[i]) * along(images.width[i]));
  }
  return images;
}

__device__ KeyTable table_of(const Image& image, const Corners& work) {
  return {work.keys + Corners::kSlots * int64_t{image.begin}, Corners::kSlots * image.pixels()};
}

// With the scale of features of each.
struct ScaledImages : Images {
  float scale[kMaxImages][kAxes] = {};
};

// Sections 3.1 and 3.2 of Adams et al.: maps a pixel into the plane where coordinates sum to 0 and finds the nearest
// remainder-0 point; the order of the differences gives the simplex around the pixel.
__device__ inline void embed(const int32_t (&features)[kAxes], const float (&scale)[kAxes],
                             LatticeKey (&keys)[kCorners], float (&weights)[kCorners]) {
  float elevated[kCorners], sum = 0;
#pragma unroll
  for (int i = kAxes; i > 0; --i) {
    const float f = static_cast<float>(features[i - 1]) * scale[i - 1];
    elevated[i] = sum - static_cast<float>(i) * f;
    sum += f;
  }
  elevated[0] = sum;

  float difference[kCorners];
  int32_t point[kCorners], rank[kCorners], total = 0;
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
    const float nearest = rintf(elevated[i] * (1.0f / kCorners));
    difference[i] = elevated[i] - static_cast<float>(kCorners) * nearest;
    point[i] = static_cast<int32_t>(nearest);
    total += point[i];
  }
#pragma unroll
  for (int i = 0; i < kCorners; ++i) rank[i] = total;  // then: 0 for the largest difference
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
#pragma unroll
    for (int j = i + 1; j < kCorners; ++j) {
      const bool less = difference[i] < difference[j];
      rank[i] += less;
      rank[j] += !less;
    }
  }
  float sorted[kCorners] = {};
  int32_t order = 0;
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
    // The rounded coordinates may not sum to 0: those rounded farthest move back one step.
    const int32_t back = rank[i] < 0 ? 1 : rank[i] > kAxes ? -1 : 0;
    rank[i] += kCorners * back;
    point[i] += back;
    order |= i << (3 * (kAxes - rank[i]));
    const float value = difference[i] * (1.0f / kCorners) - static_cast<float>(back);
#pragma unroll
    for (int r = 0; r < kCorners; ++r) sorted[r] = rank[i] == r ? value : sorted[r];
  }

  LatticeKey key = 0;
#pragma unroll
  for (int i = 0; i < kAxes; ++i) key += static_cast<LatticeKey>(point[i] + kLatticeBias) * lattice_unit(i);
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    weights[r] = r == 0 ? 1 + sorted[kAxes] - sorted[0] : sorted[kCorners - 1 - r] - sorted[kCorners - r];
    keys[r] = key;
    key = lattice_step(key, order & 7);
    order >>= 3;
  }
}

// Writes the entries of a tile and the list of its vertices, and adds those to the image's table. Reads 3 bytes per
// pixel and writes 36; then a few random accesses for each vertex of the tile.
__global__ void __launch_bounds__(kTilePixels)
    find_vertices(const __grid_constant__ ScaledImages images, const uint8_t* rgb, const __grid_constant__ Corners work,
                  int32_t* counts) {
  __shared__ LatticeKey keys_of_tile[kTileSlots];
  __shared__ int32_t place[kTileSlots];  // in the list, of the vertex in a slot
  __shared__ int32_t listed, added, before;
  const int in_launch = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, in_launch);
  const Tile tile(image);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t i = thread; i < kTileSlots; i += kTilePixels) keys_of_tile[i] = kNoKey;
  if (thread == 0) listed = added = 0;
  __syncthreads();

  const KeyTable of_tile = {keys_of_tile, kTileSlots};
  int32_t slots[kCorners];
  if (tile.has(thread)) {
    const int32_t x = tile.left + Tile::column(thread), y = tile.top + Tile::row(thread);
    const uint8_t* const color = rgb + 3 * int64_t{tile.place(thread)};
    LatticeKey keys[kCorners];
    float weights[kCorners];
    embed({x, y, color[0], color[1], color[2]}, images.scale[in_launch], keys, weights);
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      work.weights[tile.entry(thread, r)] = weights[r];
      bool is_new;
      slots[r] = of_tile.insert(keys[r], &is_new);
      if (is_new) place[slots[r]] = atomicAdd(&listed, 1);
    }
  }
  __syncthreads();
  if (tile.has(thread)) {
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      work.local[tile.entry(thread, r)] = static_cast<uint16_t>(place[slots[r]]);
    }
  }

  const KeyTable table = table_of(image, work);
  int32_t* const numbers = work.numbers + Corners::kSlots * int64_t{image.begin};
  __syncthreads();
  for (int32_t i = thread; i < kTileSlots; i += kTilePixels) {
    if (keys_of_tile[i] == kNoKey) continue;
    bool is_new;
    const int32_t slot = table.insert(keys_of_tile[i], &is_new);
    work.list[kCorners * tile.first + place[i]] = is_new ? ~slot : slot;
    if (is_new) numbers[slot] = atomicAdd(&added, 1);
    place[i] = is_new ? slot : kNone;
  }
  __syncthreads();
  if (thread == 0) {
    before = atomicAdd(&counts[image.index], added);
    work.listed[tile.first] = listed;
  }
  __syncthreads();
  for (int32_t i = thread; i < kTileSlots; i += kTilePixels) {
    if (keys_of_tile[i] != kNoKey && place[i] != kNone) numbers[place[i]] += before;
  }
}

// -- the second call, with vertices numbered through the batch --

// The arrays of an update, over entries and vertices of the whole batch.
struct Lattice {
  int64_t vertices;
  const int32_t *list, *listed;  // as in Corners
  const uint16_t* local;
  float* weights;
  int32_t* neighbors;     // [6, vertices, 2]; kNone: none
  Fixed* sums;            // [vertices, channels]; 0 except between a splat and `take_sums`
  float *values, *other;  // [vertices, channels]
};

// `before`: number of vertices of the images before each, including other launches.
struct VertexImages : Images {
  int32_t before[kMaxImages] = {};
};

// Replaces slots by vertices, and searches the neighbors of those that were first seen in the tile.
__global__ void __launch_bounds__(kJoinThreads)
    join_vertices(const __grid_constant__ VertexImages images, const __grid_constant__ Corners work,
                  const __grid_constant__ Lattice lattice) {
  const int in_launch = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, in_launch);
  const Tile tile(image);
  const KeyTable table = table_of(image, work);
  const int32_t* const numbers = work.numbers + Corners::kSlots * int64_t{image.begin};
  const int32_t before = images.before[in_launch], count = work.listed[tile.first];
  int32_t* const list = work.list + kCorners * tile.first;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += kJoinThreads) {
    const bool first = list[i] < 0;
    const int32_t slot = first ? ~list[i] : list[i], vertex = before + numbers[slot];
    list[i] = vertex;
    if (!first) continue;
    const LatticeKey key = table.keys[slot];
    for (int j = 0; j < kCorners; ++j) {
      const int32_t found = table.find(lattice_step(key, j));
      if (found == kNone) continue;
      const int32_t next = before + numbers[found];
      int32_t* const near = lattice.neighbors + 2 * j * lattice.vertices;
      near[2 * int64_t{vertex} + 1] = next;  // the others are already kNone
      near[2 * int64_t{next}] = vertex;
    }
  }
}

// -- filter --

// The entries of a tile, and values or sums of its vertices, in shared memory. Vertices that have no room there are
// read and added to in global memory.
template <int kWidth>
struct TileMemory {
  static constexpr int kRoom = kWidth == 1 ? kTileEntries : 8192;  // all vertices; 341 of 24 channels

  float weights[kCorners][kTilePixels];
  int32_t places[kCorners][kTilePixels];  // of the vertex's first vector in `room`, or ~vertex
  alignas(16) int32_t room[kRoom];
};

// What a thread block does with its tile. Vertices and pixels have `vectors` vectors of channels.
template <int kWidth>
struct TileFilter {
  typedef Channels<kWidth> Vector;

  __device__ TileFilter(const Tile& tile, const Lattice& lattice, int32_t vectors, TileMemory<kWidth>& memory)
      : lattice(lattice),
        list(lattice.list + kCorners * tile.first),
        vectors(vectors),
        inside(min(lattice.listed[tile.first], TileMemory<kWidth>::kRoom / (kWidth * vectors))),
        memory(memory) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    if (tile.has(thread)) {
#pragma unroll
      for (int r = 0; r < kCorners; ++r) {
        const int32_t entry = tile.entry(thread, r), local = lattice.local[entry];
        memory.weights[r][thread] = lattice.weights[entry];
        memory.places[r][thread] = local < inside ? local * vectors : ~list[local];
      }
    }
  }

  // Reads the values of the vertices. A barrier must follow.
  __device__ void load() const {
    auto* const values = reinterpret_cast<Vector*>(memory.room);
    for (auto i = static_cast<int32_t>(threadIdx.x); i < inside * vectors; i += kTilePixels) {
      values[i] = of_vertex(list[i / vectors])[i % vectors];
    }
  }

  __device__ const Vector* of_vertex(int32_t vertex) const {
    return reinterpret_cast<const Vector*>(lattice.values) + vertex * vectors;
  }

  // The sum of the vertices of a pixel, times their weights.
  __device__ Vector slice(int32_t pixel, int32_t vector) const {
    const auto* const values = reinterpret_cast<const Vector*>(memory.room);
    Vector sum = {};
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      const int32_t place = memory.places[r][pixel];
      Vector value = values[place >= 0 ? place + vector : 0];
      if (place < 0) value = of_vertex(~place)[vector];
      sum.add(memory.weights[r][pixel], value);
    }
    return sum;
  }

  // Adds to lattice.sums. Threads group * i .. group * i + group - 1 call value(pixel, vector) for pixels i, i +
  // kTilePixels / group, ...; `values` are at most 1. All threads of a block call this, after a barrier.
  template <class F>
  __device__ void splat(const Tile& tile, int32_t group, F value) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t channels = kWidth * vectors;
    for (int32_t i = thread; i < inside * channels; i += kTilePixels) memory.room[i] = 0;
    // No sum exceeds the sum of each pixel's largest weight. It must be below 2^30 in fixed point.
    float most = 0;
    if (tile.has(thread)) {
#pragma unroll
      for (int r = 0; r < kCorners; ++r) most = fmaxf(most, memory.weights[r][thread]);
    }
    const float bound = fmaxf(block_reduce<kTilePixels / 32>(most, Sum()), 0x1p-6f);  // has barriers
    const int bits = 30 - (static_cast<int>(__float_as_uint(bound) >> 23) - 126);     // bound < 2^(30 - bits)
    const float scale = ldexpf(1.0f, bits);
    const int32_t unit = 1 << (kSumBits - bits);
    for (int32_t pixel = thread / group; pixel < kTilePixels; pixel += kTilePixels / group) {
      if (!tile.has(pixel)) continue;
      for (int32_t v = thread % group; v < vectors; v += group) {
        const Vector own = value(pixel, v);
#pragma unroll
        for (int r = 0; r < kCorners; ++r) {
          const int32_t place = memory.places[r][pixel];
          const float weight = scale * memory.weights[r][pixel];
          int32_t products[kWidth];
#pragma unroll
          for (int k = 0; k < kWidth; ++k) products[k] = __float2int_rn(weight * own.of[k]);
          if (place >= 0) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              atomicAdd(&memory.room[place * kWidth + k * vectors + v], products[k]);
            }
          } else {
            for (int k = 0; k < kWidth; ++k) add(~place, k * vectors + v, int64_t{products[k]} * unit);
          }
        }
      }
    }
    __syncthreads();
    for (int32_t i = thread; i < inside * channels; i += kTilePixels) {
      if (memory.room[i] != 0) add(list[i / channels], i % channels, int64_t{memory.room[i]} * unit);
    }
  }

  __device__ void add(int32_t vertex, int32_t channel, int64_t sum) const {
    atomicAdd(&lattice.sums[vertex * kWidth * vectors + channel], static_cast<Fixed>(sum));
  }

  const Lattice& lattice;
  const int32_t* list;
  int32_t vectors, inside;  // inside: vertices in shared memory
  TileMemory<kWidth>& memory;
};

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

__device__ inline int32_t my_item() { return static_cast<int32_t>(blockIdx.x * kChunk + threadIdx.x); }

// lattice.values = lattice.sums, which becomes 0. Reads and writes 8 bytes per vertex and channel, and writes 4.
template <int kWidth>
__global__ void __launch_bounds__(kChunk) take_sums(const __grid_constant__ Lattice lattice, int32_t vectors) {
  const int32_t i = my_item();
  if (i >= lattice.vertices * vectors) return;
  Fixed* const sums = lattice.sums + i / vectors * vectors * kWidth + i % vectors;
  Channels<kWidth> value;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    value.of[k] = static_cast<float>(static_cast<int64_t>(sums[k * vectors])) * (1.0f / (int64_t{1} << kSumBits));
    sums[k * vectors] = 0;
  }
  reinterpret_cast<Channels<kWidth>*>(lattice.values)[i] = value;
}

// Every vertex plus half of its two neighbors in a direction. Reads 8 bytes of neighbors per vertex, and per channel 12
// bytes, 8 of them mostly from L2; writes 4.
template <int kWidth>
__global__ void __launch_bounds__(kChunk)
    blur(const __grid_constant__ Lattice lattice, int32_t direction, int32_t vectors, const float* from, float* to) {
  typedef Channels<kWidth> Vector;
  const int32_t i = my_item();
  if (i >= lattice.vertices * vectors) return;
  const auto vertex = static_cast<int32_t>(static_cast<unsigned>(i) / static_cast<unsigned>(vectors));
  const auto* const own = reinterpret_cast<const Vector*>(from) + i;
  const int32_t* const near = lattice.neighbors + 2 * (direction * lattice.vertices + vertex);
  const auto value = [&](int32_t v) { return v == kNone ? Vector{} : own[(v - vertex) * vectors]; };
  Vector around = value(near[0]), sum = *own;
  around.add(1, value(near[1]));
  sum.add(0.5f, around);
  reinterpret_cast<Vector*>(to)[i] = sum;
}

// Makes lattice.values of lattice.sums: those that `slice` reads.
template <int kWidth>
void blur_sums(const Lattice& lattice, int32_t vectors, Stream stream) {
  const int64_t chunks = chunks_of(lattice.vertices * vectors);
  launch(take_sums<kWidth>, chunks, kChunk, stream, lattice, vectors);
  for (int32_t j = 0; j < kCorners; j += 2) {
    launch(blur<kWidth>, chunks, kChunk, stream, lattice, j, vectors, lattice.values, lattice.other);
    launch(blur<kWidth>, chunks, kChunk, stream, lattice, j + 1, vectors, lattice.other, lattice.values);
  }
}

__global__ void __launch_bounds__(kTilePixels, 4)
    splat_ones(const __grid_constant__ Images images, const __grid_constant__ Lattice lattice) {
  __shared__ TileMemory<1> memory;
  const Tile tile(my_image(images, images.chunks));
  const TileFilter<1> filter(tile, lattice, 1, memory);
  filter.splat(tile, 1, [](int32_t, int32_t) { return Channels<1>{{1}}; });
}

// Divides the weights by the square root of the filtered ones.
__global__ void __launch_bounds__(kTilePixels, 4)
    normalize(const __grid_constant__ Images images, const __grid_constant__ Lattice lattice) {
  __shared__ TileMemory<1> memory;
  const Tile tile(my_image(images, images.chunks));
  const TileFilter<1> filter(tile, lattice, 1, memory);
  filter.load();
  __syncthreads();
  const auto pixel = static_cast<int32_t>(threadIdx.x);
  if (!tile.has(pixel)) return;
  const float norm = 1 / sqrtf(filter.slice(pixel, 0).of[0] + 1e-20f);
#pragma unroll
  for (int r = 0; r < kCorners; ++r) lattice.weights[tile.entry(pixel, r)] *= norm;
}

}  // namespace
}  // namespace namedmask::cuda
