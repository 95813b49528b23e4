// SPDX-License-Identifier: MIT
// The lattice of all images (dense_crf_lattice.h) and the grid of the Gaussian of position (dense_crf_grid.h) are built
// once. An update is then
//
//   take_sums, 6 x blur                                         the marginals on the lattice
//   add_rows, add_columns, 2 x blur_nodes, read_columns         and on the grid
//   update                                                      sums both with the unary; the softmax; adds it to the
//                                                               next lattice
//
// Two labels are one channel, the difference of their scores and marginals, since filters are linear.
//
// No sum uses atomics on floats: they add integers, or gather their inputs in a fixed order, so results are
// bit-identical in every run and do not depend on batch composition.
#include <algorithm>
#include <string>
#include <utility>

#include "dense_crf_grid.h"
#include "dense_crf_lattice.h"
#include "namedmask/dense_crf.h"

namespace namedmask::cuda {
namespace {

// The channels of a pixel: one for two labels, otherwise vectors of four.
int32_t vectors_of(int64_t labels) { return labels == 2 ? 1 : static_cast<int32_t>((labels + 3) / 4); }
int64_t channels_of(int64_t labels) { return labels == 2 ? 1 : 4 * int64_t{vectors_of(labels)}; }

// The workspace of the second call.
struct Workspace {
  Workspace(int32_t* begin, int64_t pixels, int64_t vertices, int64_t channels, const Grids& grids) {
    int32_t* next = begin;
    const auto take = [&](int64_t count) { return std::exchange(next, next + (count + 3) / 4 * 4); };  // 16 bytes
    const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count)); };
    lattice.vertices = vertices;
    lattice.neighbors = take(2 * kCorners * vertices);
    lattice.sums = reinterpret_cast<Fixed*>(take(2 * vertices * channels));
    lattice.values = take_floats(vertices * channels);
    lattice.other = take_floats(vertices * channels);
    tables = take_floats(grids.tables);
    halves = take_floats(grids.halves * channels);
    nodes = take_floats(grids.nodes * channels);
    other_nodes = take_floats(grids.nodes * channels);
    marginals = take_floats(pixels * channels);
    size = next - begin;
  }

  Lattice lattice = {};
  float* tables;
  float* halves;               // [halves, channels]
  float *nodes, *other_nodes;  // [nodes, channels]
  float* marginals;            // [P, channels]
  int64_t size;                // in int32
};

// log(clip(p)) of a chunk of pixels, all labels; flags the image if a value is not finite. Reads and writes 4 bytes per
// label and pixel.
__global__ void __launch_bounds__(kChunk) take_logs(const __grid_constant__ Images images, int32_t labels,
                                                    const float* probabilities, float* out, int32_t* invalid) {
  const Image image = my_image(images, images.chunks);
  const int64_t begin = int64_t{image.block} * kChunk * labels;
  const int64_t end = min(begin + int64_t{kChunk} * labels, int64_t{image.pixels()} * labels);
  const int64_t at = int64_t{image.begin} * labels;
  for (int64_t i = begin + threadIdx.x; i < end; i += kChunk) {
    const float p = probabilities[at + i];
    if (!(fabsf(p) < INFINITY)) invalid[image.index] = 1;  // every thread writes the same value
    out[at + i] = logf(fminf(fmaxf(p, 1e-5f), 1.0f));
  }
}

// The arguments of an update besides the lattice.
struct Update {
  int32_t labels, vectors, group;  // group: lanes of a warp that share a pixel, a power of two
  float bilateral_weight;
  bool messages;  // false: softmax of the unary only
  bool last;      // writes the marginals of the labels over the unary; otherwise those of channels for the next update
};

// The unary of two labels as one channel.
__device__ inline void read_unary(const float* of_pixel, int32_t, int32_t, int32_t, Channels<1>* score) {
  score->of[0] = of_pixel[1] - of_pixel[0];
}

// The unary of a vector. Channels that are not labels get a probability of 0.
__device__ inline void read_unary(const float* of_pixel, int32_t vector, int32_t vectors, int32_t labels,
                                  Channels<4>* score) {
  const float* at = of_pixel + vector;
#pragma unroll
  for (int k = 0; k < 4; ++k, at += vectors) score->of[k] = k * vectors + vector < labels ? *at : -INFINITY;
}

// Marginals of a tile, one pixel for each group of lanes, and their splat. Reads per pixel 36 bytes of entries, 8 per
// label (unary and halves) and the tile's vertices, and writes 4 per label. `out` holds the unary.
template <int kWidth>
__global__ void __launch_bounds__(kTilePixels, 4)
    update(const __grid_constant__ GridImages images, const __grid_constant__ Lattice lattice,
           const __grid_constant__ Update settings, float* tables, const Channels<kWidth>* halves,
           Channels<kWidth>* marginals, float* out) {
  typedef Channels<kWidth> Vector;
  __shared__ TileMemory<kWidth> memory;
  __shared__ ColumnTaps of_columns[kSide];
  const GridImage grid = my_grid(images, tables);
  const Tile tile(grid);
  const int32_t labels = settings.labels, vectors = kWidth == 1 ? 1 : settings.vectors;
  const int32_t group = kWidth == 1 ? 1 : settings.group;
  const auto thread = static_cast<int32_t>(threadIdx.x), lane = thread % group;
  const TileFilter<kWidth> filter(tile, lattice, vectors, memory);
  if (settings.messages) filter.load();
  if (thread < tile.columns) of_columns[thread] = ColumnTaps(grid, tile.left + thread);
  __syncthreads();
  for (int32_t turn = thread / group; turn < kTilePixels; turn += kTilePixels / group) {
    // Lanes without a pixel repeat the first one, so that all lanes of a warp take part in the shuffles.
    const bool inside = tile.has(turn);
    const int32_t pixel = inside ? turn : 0;
    float* const own_out = out + int64_t{tile.place(pixel)} * labels;
    Vector* const own = marginals + int64_t{tile.place(pixel)} * vectors;
    const auto score_of = [&](int32_t v) {
      Vector score;
      read_unary(own_out, v, vectors, labels, &score);
      if (settings.messages) {
        score.add(1, read_row(grid, vectors, halves, of_columns[Tile::column(pixel)], tile.top + Tile::row(pixel), v));
        score.add(settings.bilateral_weight, filter.slice(pixel, v));
      }
      return score;
    };
    if constexpr (kWidth == 1) {
      const float score = score_of(0).of[0];
      const float ratio = expf(-fabsf(score)), larger = 1 / (1 + ratio);
      if (inside && settings.last) {
        own_out[score > 0] = larger;
        own_out[score <= 0] = ratio * larger;
      } else if (inside) {
        own->of[0] = copysignf((1 - ratio) * larger, score);
      }
    } else {
      // With more vectors than lanes, scores are kept in `marginals`.
      const bool many = vectors > group;
      Vector vector = {};
      float best = -INFINITY, sum = 0;
      for (int32_t v = lane; v < vectors; v += group) {
        vector = score_of(v);
        if (many && inside) own[v] = vector;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) best = fmaxf(best, vector.of[k]);
      }
      for (int step = group / 2; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
      for (int32_t v = lane; v < vectors; v += group) {
        if (many && inside) vector = own[v];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum += vector.of[k] = expf(vector.of[k] - best);
        if (many && inside) own[v] = vector;
      }
      for (int step = group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      for (int32_t v = lane; inside && v < vectors; v += group) {
        if (many && inside) vector = own[v];
        vector.scale(1 / sum);
        if (!settings.last) own[v] = vector;
#pragma unroll
        for (int k = 0; settings.last && k < kWidth; ++k) {
          if (k * vectors + v < labels) own_out[k * vectors + v] = vector.of[k];
        }
      }
    }
  }
  if (settings.last) return;
  __syncthreads();
  filter.splat(tile, group,
               [&](int32_t pixel, int32_t v) { return marginals[int64_t{tile.place(pixel)} * vectors + v]; });
}

RaggedShape expect_batch(const TensorView& offsets, const TensorView& shapes, int64_t pixels,
                         const CrfSettings& settings) {
  const RaggedShape batch = expect_ragged("dense_crf", offsets, shapes, pixels);
  expect_sigmas(batch, settings);
  if (pixels > INT32_MAX / (2 * kCorners)) throw std::invalid_argument("dense_crf: more than 178 million pixels");
  return batch;
}

int64_t sum_of(const int32_t* counts, int64_t n) {
  int64_t sum = 0;
  for (int64_t b = 0; b < n; ++b) sum += counts[b];
  return sum;
}

// The mean-field updates, once the lattice has been normalized.
template <int kWidth>
void infer(const Workspace& work, const Grids& grids, const CrfSettings& settings, const TensorView& out,
           Stream stream) {
  typedef Channels<kWidth> Vector;
  const auto labels = static_cast<int32_t>(out.shape[1]), vectors = vectors_of(labels);
  auto *const marginals = reinterpret_cast<Vector*>(work.marginals), *const halves =
                                                                         reinterpret_cast<Vector*>(work.halves);
  auto *const nodes = reinterpret_cast<Vector*>(work.nodes), *const other = reinterpret_cast<Vector*>(work.other_nodes);
  int32_t group = 1;
  while (group < 32 && group < vectors) group *= 2;
  for (int64_t i = 0; i <= settings.iterations; ++i) {
    const bool messages = i > 0;
    if (messages) blur_sums<kWidth>(work.lattice, vectors, stream);
    const Update how = {
        labels, vectors, group, static_cast<float>(settings.bilateral_weight), messages, i == settings.iterations};
    for (const GridImages& images : grids.groups) {
      if (messages) {
        const GridImages of_halves = with_chunks(images, Items::kHalves, vectors);
        const GridImages of_nodes = with_chunks(images, Items::kNodes, vectors);
        const int64_t half_blocks = blocks_of(of_halves), node_blocks = blocks_of(of_nodes);
        launch(add_rows<kWidth>, half_blocks, kChunk, stream, of_halves, work.tables, vectors, marginals, halves);
        launch(add_columns<kWidth>, node_blocks, kChunk, stream, of_nodes, work.tables, vectors, halves, nodes);
        launch(blur_nodes<kWidth>, node_blocks, kChunk, stream, of_nodes, work.tables, vectors, false, nodes, other);
        launch(blur_nodes<kWidth>, node_blocks, kChunk, stream, of_nodes, work.tables, vectors, true, other, nodes);
        launch(read_columns<kWidth>, half_blocks, kChunk, stream, of_halves, work.tables, vectors,
               static_cast<float>(settings.gaussian_weight), nodes, halves);
      }
      const GridImages tiles = with_tiles(images);
      launch(update<kWidth>, blocks_of(tiles), kTilePixels, stream, tiles, work.lattice, how, work.tables, halves,
             marginals, out.as<float>());
    }
  }
}

}  // namespace

void dense_crf_lattice(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& out, const TensorView& status,
                       const TensorView& workspace, const CrfSettings& settings, Stream stream) {
  const char* op = "dense_crf";
  expect(op, "probabilities", probabilities, DType::kFloat32, {-1, -1}, Device::kCUDA);
  const int64_t pixels = probabilities.shape[0], labels = probabilities.shape[1];
  expect(op, "image", image, DType::kUInt8, {pixels, 3}, Device::kCUDA);
  expect(op, "out", out, DType::kFloat32, {pixels, labels}, Device::kCUDA);
  const RaggedShape batch = expect_batch(offsets, shapes, pixels, settings);
  expect(op, "status", status, DType::kInt32, {2, batch.count}, Device::kCUDA);
  expect(op, "workspace", workspace, DType::kInt32, {kWorkspace * pixels}, Device::kCUDA);
  const Corners corners(workspace, pixels);
  int32_t *const counts = status.as<int32_t>(), *const invalid = counts + batch.count;
  const OnDevice device(probabilities);
  check(cudaMemsetAsync(counts, 0, sizeof(int32_t) * 2 * batch.count, static_cast<cudaStream_t>(stream.handle)));
  corners.clear(pixels, stream);
  for_each_group(batch, [&](const Images& group, int64_t chunks) {
    launch(take_logs, chunks, kChunk, stream, group, static_cast<int32_t>(labels), probabilities.as<float>(),
           out.as<float>(), invalid);
    ScaledImages images = {with_tiles(group)};
    for (int32_t i = 0; i < kAxes * images.count; ++i) {
      const double sigma = settings.bilateral_sigma[images.first + i / kAxes];
      images.scale[i / kAxes][i % kAxes] = lattice_scale(i % kAxes, sigma, settings.bilateral_sigma_rgb);
    }
    launch(find_vertices, blocks_of(images), kTilePixels, stream, images, image.as<uint8_t>(), corners, counts);
  });
}

int64_t dense_crf_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                            int64_t labels, const CrfSettings& settings) {
  const int64_t pixels = offsets.as<int32_t>()[offsets.shape[0] - 1];
  const RaggedShape batch = expect_batch(offsets, shapes, pixels, settings);
  expect("dense_crf", "counts", counts, DType::kInt32, {batch.count});
  const Grids grids = lay_grids(batch, settings.gaussian_sigma);
  return Workspace(nullptr, pixels, sum_of(counts.as<int32_t>(), batch.count), channels_of(labels), grids).size;
}

void dense_crf(const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& counts,
               const TensorView& lattice_workspace, const TensorView& workspace, const CrfSettings& settings,
               Stream stream) {
  const char* op = "dense_crf";
  expect(op, "out", out, DType::kFloat32, {-1, -1}, Device::kCUDA);
  const int64_t pixels = out.shape[0], labels = out.shape[1];
  const RaggedShape batch = expect_batch(offsets, shapes, pixels, settings);
  expect(op, "counts", counts, DType::kInt32, {batch.count});
  expect(op, "lattice_workspace", lattice_workspace, DType::kInt32, {kWorkspace * pixels}, Device::kCUDA);
  const Grids grids = lay_grids(batch, settings.gaussian_sigma);
  const int32_t* const vertices = counts.as<int32_t>();
  const Corners corners(lattice_workspace, pixels);
  Workspace work(workspace.as<int32_t>(), pixels, sum_of(vertices, batch.count), channels_of(labels), grids);
  expect(op, "workspace", workspace, DType::kInt32, {work.size}, Device::kCUDA);
  if (pixels == 0 || labels == 0) return;
  Lattice& lattice = work.lattice;
  if (std::max(grids.most, lattice.vertices) * channels_of(labels) > INT32_MAX - kChunk) {
    throw std::invalid_argument("dense_crf: too many pixels times labels; give fewer images at a time");
  }
  const OnDevice device(out);

  lattice.list = corners.list;
  lattice.listed = corners.listed;
  lattice.local = corners.local;
  lattice.weights = corners.weights;
  const auto fill = [&](void* array, int value, int64_t bytes) {
    check(cudaMemsetAsync(array, value, bytes, static_cast<cudaStream_t>(stream.handle)));
  };
  fill(lattice.neighbors, 0xff, sizeof(int32_t) * 2 * kCorners * lattice.vertices);  // kNone
  fill(lattice.sums, 0, sizeof(Fixed) * lattice.vertices * channels_of(labels));
  int32_t before = 0;
  for_each_group(batch, [&](const Images& group, int64_t) {
    VertexImages images = {with_tiles(group)};
    for (int32_t i = 0; i < images.count; ++i)
      images.before[i] = std::exchange(before, before + vertices[images.first + i]);
    launch(join_vertices, blocks_of(images), kJoinThreads, stream, images, corners, lattice);
    launch(splat_ones, blocks_of(images), kTilePixels, stream, images, lattice);
  });
  blur_sums<1>(lattice, 1, stream);
  for_each_group(batch, [&](const Images& group, int64_t) {
    const Images images = with_tiles(group);
    launch(normalize, blocks_of(images), kTilePixels, stream, images, lattice);
  });
  for (const GridImages& group : grids.groups) {
    const GridImages images = with_chunks(group, Items::kTables, 1);
    launch(fill_tables, blocks_of(images), kChunk, stream, images, work.tables);
  }
  if (labels == 2) {
    infer<1>(work, grids, settings, out, stream);
  } else {
    infer<4>(work, grids, settings, out, stream);
  }
}

}  // namespace namedmask::cuda
