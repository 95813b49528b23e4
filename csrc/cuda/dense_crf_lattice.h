// SPDX-License-Identifier: MIT
// dense_crf's permutohedral lattice on the device. Entry 6 p + r is corner r of pixel p's simplex: a vertex and a
// weight. First the vertices of every image are found and counted. Once the counts are known, vertices are numbered
// through the whole batch and their entries sorted: from then on all images are processed as one.
#pragma once

#include "hash_table.h"
#include "permutohedral.h"
#include "sort.h"

namespace namedmask::cuda {
namespace {

constexpr int kCorners = kLatticeCorners, kAxes = kLatticeAxes;
constexpr int kPiece = 64;  // entries of a vertex that one thread adds

// The workspace of the first call, 49 P + B int32. Entries and vertices are numbered within their image.
struct Corners {
  Corners(const TensorView& workspace, int64_t pixels) {
    auto* next = workspace.as<int32_t>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    keys = reinterpret_cast<LatticeKey*>(take(2 * kCorners * pixels));
    slots = take(2 * kCorners * pixels);
    vertex = take(kCorners * pixels);
    rank = take(kCorners * pixels);
    first = take(kCorners * pixels);
    weights = reinterpret_cast<float*>(take(kCorners * pixels));
    chunk_first = next;
  }

  LatticeKey* keys;      // [6 P]
  int32_t* slots;        // [12 P]
  int32_t* vertex;       // [6 P]; until the vertices are numbered, the entry's slot
  int32_t* rank;         // [6 P]: of a vertex's first entry among those of its chunk
  int32_t* first;        // [6 P]: first entry of each vertex of an image
  float* weights;        // [6 P]
  int32_t* chunk_first;  // number of vertices in the chunks before this one
};

__device__ FirstTable<LatticeKey> table_of(const Image& image, const Corners& work) {
  return {work.slots + 2 * kCorners * int64_t{image.begin}, work.keys + kCorners * int64_t{image.begin}};
}

__device__ Region region_of(const Image& image) { return {0, 2 * kCorners * image.pixels()}; }

// With the scale of features of each.
struct ScaledImages : Images {
  float scale[kMaxImages][kAxes] = {};
};

// Sections 3.1 and 3.2 of Adams et al.: maps the pixel into the plane where coordinates sum to 0 and finds the nearest
// remainder-0 point; the order of the differences gives the simplex around the pixel. Writes 72 + 48 bytes per pixel.
__global__ void __launch_bounds__(kChunk)
    embed(const __grid_constant__ ScaledImages images, const uint8_t* rgb, const __grid_constant__ Corners work) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const int64_t at = int64_t{image.begin} + pixel;
  float elevated[kCorners], sum = 0;
#pragma unroll
  for (int i = kAxes; i > 0; --i) {
    const int32_t feature = i == 1 ? pixel % image.width : i == 2 ? pixel / image.width : rgb[3 * at + i - 3];
    const float f = static_cast<float>(feature) * images.scale[place][i - 1];
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
  float* const weights = work.weights + kCorners * at;
  weights[0] = 1 + sorted[kAxes] - sorted[0];
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    if (r > 0) weights[r] = sorted[kCorners - 1 - r] - sorted[kCorners - r];
    work.keys[kCorners * at + r] = key;
    work.slots[2 * (kCorners * at + r)] = work.slots[2 * (kCorners * at + r) + 1] = kNone;
    key = lattice_step(key, order & 7);
    order >>= 3;
  }
}

// For the kernels below, images.chunks counts entries. Random accesses of 4 and 8 bytes, mostly in L2, since there are
// far fewer vertices than entries.
__global__ void __launch_bounds__(kChunk)
    insert_corners(const __grid_constant__ Images images, const __grid_constant__ Corners work) {
  const Image image = my_image(images, images.chunks);
  const int32_t entry = image.chunk_item();
  if (entry >= kCorners * image.pixels()) return;
  work.vertex[kCorners * int64_t{image.begin} + entry] = table_of(image, work).insert(region_of(image), entry);
}

__global__ void __launch_bounds__(kChunk)
    rank_vertices(const __grid_constant__ Images images, const __grid_constant__ Corners work) {
  const Image image = my_image(images, images.chunks);
  const int32_t entry = image.chunk_item();
  const bool inside = entry < kCorners * image.pixels();
  const int64_t at = kCorners * int64_t{image.begin} + entry;
  const int32_t* const slots = table_of(image, work).slots;
  const int32_t rank = rank_in_chunk(inside && slots[work.vertex[at]] == entry, &work.chunk_first[blockIdx.x]);
  if (inside) work.rank[at] = rank;
}

__global__ void __launch_bounds__(kChunk)
    number_vertices(const __grid_constant__ Images images, const __grid_constant__ Corners work) {
  const Image image = my_image(images, images.chunks);
  const int32_t entry = image.chunk_item();
  if (entry >= kCorners * image.pixels()) return;
  const int64_t begin = kCorners * int64_t{image.begin};
  const int32_t first = table_of(image, work).slots[work.vertex[begin + entry]];
  const int32_t chunk = static_cast<int32_t>(blockIdx.x) - image.block + first / kChunk;
  const int32_t vertex = work.chunk_first[chunk] + work.rank[begin + first];
  work.vertex[begin + entry] = vertex;
  if (first == entry) work.first[begin + vertex] = entry;
}

// -- the second call, with vertices numbered through the batch --

// The arrays of an update, over entries and vertices of the whole batch.
struct Lattice {
  int64_t vertices, entries;
  const int32_t* vertex;  // [entries]
  float* weights;         // [entries]; `normalize` multiplies them by the pixel's norm
  int32_t* neighbors;     // [6, vertices, 2]; kNone: none
  int32_t* starts;        // [vertices + 1]: first sorted entry of a vertex
  int32_t* sorted;        // [entries]: entries ordered by vertex, then by pixel
  float* sorted_weights;  // [entries]
  int32_t* pieces;        // [vertices + 1]: first piece of a vertex
  int32_t* piece_vertex;  // [most_pieces()]
  float* of_pieces;       // [most_pieces(), channels]
  float *values, *other;  // [vertices, channels]

  int64_t most_pieces() const { return vertices + entries / kPiece; }
};

// `before`: number of vertices of the images before each, including other launches.
struct VertexImages : Images {
  int32_t before[kMaxImages] = {};
};

// images.chunks counts vertices. One search per neighbor.
__global__ void __launch_bounds__(kChunk)
    join_vertices(const __grid_constant__ VertexImages images, const int32_t* counts,
                  const __grid_constant__ Corners work, const __grid_constant__ Lattice lattice) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const int32_t vertex = image.chunk_item();
  if (vertex >= counts[image.index]) return;
  const int64_t begin = kCorners * int64_t{image.begin};
  const FirstTable<LatticeKey> table = table_of(image, work);
  const LatticeKey key = table.keys[work.first[begin + vertex]];
  const int32_t before = images.before[place];
  for (int j = 0; j < kCorners; ++j) {
    const int32_t entry = table.find(region_of(image), lattice_step(key, j));
    if (entry == kNone) continue;
    const int32_t next = before + work.vertex[begin + entry];
    int32_t* const near = lattice.neighbors + 2 * j * lattice.vertices;
    near[2 * int64_t{before + vertex} + 1] = next;  // the others are already kNone
    near[2 * int64_t{next}] = before + vertex;
  }
}

// images.chunks counts entries.
__global__ void __launch_bounds__(kChunk)
    number_through(const __grid_constant__ VertexImages images, const __grid_constant__ Corners work) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const int32_t entry = image.chunk_item();
  if (entry < kCorners * image.pixels()) work.vertex[kCorners * int64_t{image.begin} + entry] += images.before[place];
}

__device__ inline int32_t my_item() { return static_cast<int32_t>(blockIdx.x * kChunk + threadIdx.x); }

// Splits an item into a vertex or piece and one of its `channels`; dense_crf checks that 32 bits are enough.
struct Value {
  int32_t owner, channel;
};

__device__ inline Value my_value(int32_t channels) {
  const auto item = static_cast<unsigned>(my_item()), owner = item / static_cast<unsigned>(channels);
  return {static_cast<int32_t>(owner), static_cast<int32_t>(item - owner * static_cast<unsigned>(channels))};
}

__global__ void find_starts(const int32_t* sorted_vertices, const __grid_constant__ Lattice lattice) {
  const int32_t i = my_item();
  if (i >= lattice.entries) return;
  const int32_t vertex = sorted_vertices[i];
  if (i == 0 || sorted_vertices[i - 1] != vertex) lattice.starts[vertex] = i;
  if (i == lattice.entries - 1) lattice.starts[lattice.vertices] = static_cast<int32_t>(lattice.entries);
}

__global__ void count_pieces(const __grid_constant__ Lattice lattice) {
  const int32_t v = my_item();
  if (v > lattice.vertices) return;
  lattice.pieces[v] = v == lattice.vertices ? 0 : (lattice.starts[v + 1] - lattice.starts[v] + kPiece - 1) / kPiece;
}

__global__ void assign_pieces(const __grid_constant__ Lattice lattice) {
  const int32_t v = my_item();
  if (v >= lattice.vertices) return;
  for (int32_t p = lattice.pieces[v]; p < lattice.pieces[v + 1]; ++p) lattice.piece_vertex[p] = v;
}

__global__ void sort_weights(const __grid_constant__ Lattice lattice) {
  const int32_t i = my_item();
  if (i < lattice.entries) lattice.sorted_weights[i] = lattice.weights[lattice.sorted[i]];
}

// Adds the pixels of a piece, times their weights. Every pixel is read six times, 4 bytes per channel: most of the
// traffic of an update. `pixels` [P, channels], or nullptr for ones.
__global__ void __launch_bounds__(kChunk)
    splat_pieces(const __grid_constant__ Lattice lattice, int32_t channels, const float* pixels) {
  const auto [piece, channel] = my_value(channels);
  if (piece >= lattice.pieces[lattice.vertices]) return;
  const int32_t vertex = lattice.piece_vertex[piece];
  const int32_t begin = lattice.starts[vertex] + (piece - lattice.pieces[vertex]) * kPiece;
  const int32_t end = min(begin + kPiece, lattice.starts[vertex + 1]);
  float sum = 0;
#pragma unroll 4
  for (int32_t i = begin; i < end; ++i) {
    const int32_t pixel = lattice.sorted[i] / kCorners;
    sum += lattice.sorted_weights[i] * (pixels == nullptr ? 1 : pixels[int64_t{pixel} * channels + channel]);
  }
  lattice.of_pieces[my_item()] = sum;
}

__global__ void add_pieces(const __grid_constant__ Lattice lattice, int32_t channels) {
  const auto [vertex, channel] = my_value(channels);
  if (vertex >= lattice.vertices) return;
  float sum = 0;
  for (int32_t p = lattice.pieces[vertex]; p < lattice.pieces[vertex + 1]; ++p) {
    sum += lattice.of_pieces[p * channels + channel];
  }
  lattice.values[my_item()] = sum;
}

// Every vertex plus half of its two neighbors in a direction. Reads 8 bytes of neighbors per vertex, and per channel 12
// bytes, 8 of them mostly from L2; writes 4.
__global__ void blur(const __grid_constant__ Lattice lattice, int32_t direction, int32_t channels, const float* from,
                     float* to) {
  const auto [vertex, channel] = my_value(channels);
  if (vertex >= lattice.vertices) return;
  const int32_t* const near = lattice.neighbors + 2 * (direction * lattice.vertices + vertex);
  const int32_t own = my_item(), offset = own - vertex * channels;
  const auto value = [&](int32_t v) { return v == kNone ? 0.0f : from[v * channels + offset]; };
  to[own] = from[own] + 0.5f * (value(near[0]) + value(near[1]));
}

__device__ inline float slice(const Lattice& lattice, int64_t pixel, int32_t channels, int32_t channel) {
  float sum = 0;
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    const int64_t entry = kCorners * pixel + r;
    sum += lattice.weights[entry] * lattice.values[lattice.vertex[entry] * channels + channel];
  }
  return sum;
}

// Divides the weights by the square root of the filtered ones.
__global__ void normalize(const __grid_constant__ Lattice lattice) {
  const int32_t pixel = my_item();
  if (pixel >= lattice.entries / kCorners) return;
  const float norm = 1 / sqrtf(slice(lattice, pixel, 1, 0) + 1e-20f);
#pragma unroll
  for (int r = 0; r < kCorners; ++r) lattice.weights[kCorners * pixel + r] *= norm;
}

// lattice.values = the filtered pixels [P, channels] (nullptr: ones), before slicing.
void filter(const Lattice& lattice, int32_t channels, const float* pixels, Stream stream) {
  launch(splat_pieces, chunks_of(lattice.most_pieces() * channels), kChunk, stream, lattice, channels, pixels);
  const int64_t chunks = chunks_of(lattice.vertices * channels);
  launch(add_pieces, chunks, kChunk, stream, lattice, channels);
  for (int32_t j = 0; j < kCorners; j += 2) {
    launch(blur, chunks, kChunk, stream, lattice, j, channels, lattice.values, lattice.other);
    launch(blur, chunks, kChunk, stream, lattice, j + 1, channels, lattice.other, lattice.values);
  }
}

}  // namespace
}  // namespace namedmask::cuda
