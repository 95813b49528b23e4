// SPDX-License-Identifier: MIT
// The lattice of all images (dense_crf_lattice.h) and the grid of the Gaussian of position (dense_crf_grid.h) are built
// once. An update is then
//
//   splat_pieces, add_pieces, 6 x blur                          the marginals on the lattice
//   add_rows, add_columns, 2 x blur_nodes, read_columns         and on the grid
//   update                                                      sums both with the unary, and the softmax
//
// No sum uses atomics on floats: outputs gather their inputs in a fixed order, so results are bit-identical in every
// run and do not depend on batch composition.
#include <algorithm>
#include <string>

#include "dense_crf_grid.h"
#include "dense_crf_lattice.h"
#include "namedmask/dense_crf.h"

namespace namedmask::cuda {
namespace {

constexpr int kUpdateThreads = 256, kUpdatePixels = 32;  // per block

// The workspace of the second call.
struct Workspace {
  Workspace(int32_t* begin, int64_t pixels, int64_t vertices, int64_t channels, const Grids& grids) {
    int32_t* next = begin;
    const auto take = [&](int64_t count) { return std::exchange(next, next + (count + 3) / 4 * 4); };  // 16 bytes
    const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count)); };
    lattice.vertices = vertices;
    lattice.entries = kCorners * pixels;
    lattice.neighbors = take(2 * kCorners * vertices);
    lattice.starts = take(vertices + 1);
    lattice.pieces = take(vertices + 1);
    lattice.piece_vertex = take(lattice.most_pieces());
    lattice.of_pieces = take_floats(lattice.most_pieces() * channels);
    lattice.values = take_floats(vertices * channels);
    lattice.other = take_floats(vertices * channels);
    totals = take(chunks_of(vertices + 1));
    sorting = take(sort_scratch(kCorners * pixels));
    tables = take_floats(grids.tables);
    halves = take_floats(grids.halves * channels);
    nodes = take_floats(grids.nodes * channels);
    other_nodes = take_floats(grids.nodes * channels);
    marginals = take_floats(pixels * channels);
    size = next - begin;
  }

  Lattice lattice = {};
  int32_t *totals, *sorting;
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
  int32_t labels, group;  // group: lanes of a warp that share a pixel's softmax, a power of two
  float bilateral_weight;
  bool messages;  // false: softmax of the unary only
};

// Scores of kUpdatePixels pixels, one thread per label; then their softmax, a group of lanes per pixel. Reads 44 bytes
// per label and pixel, 40 of them from the lattice and the halves and thus mostly from caches, and writes 8. unary and
// out may be the same array, since a block reads its pixels before it writes them; so may scores and out.
__global__ void __launch_bounds__(kUpdateThreads, 4)
    update(const __grid_constant__ GridImages images, const __grid_constant__ Lattice lattice,
           const __grid_constant__ Update settings, float* tables, const float* halves, const float* unary,
           float* scores, float* out) {
  const GridImage grid = my_grid(images, tables);
  const int32_t first = grid.block * kUpdatePixels, count = min(kUpdatePixels, grid.pixels() - first);
  const int32_t labels = settings.labels;
  const auto thread = static_cast<int32_t>(threadIdx.x), lane = thread % settings.group;
  for (int32_t i = thread; i < count * labels; i += kUpdateThreads) {
    const int32_t in_block = i / labels, label = i - in_block * labels;
    const int32_t pixel = first + in_block;
    const int64_t at = int64_t{grid.begin} + pixel;
    float score = unary[at * labels + label];
    if (settings.messages) {
      score += read_row(grid, labels, halves, pixel % grid.width, pixel / grid.width, label);
      score += settings.bilateral_weight * slice(lattice, at, labels, label);
    }
    scores[at * labels + label] = score;
  }
  __syncthreads();
  for (int32_t turn = 0; turn < count; turn += kUpdateThreads / settings.group) {
    const int32_t p = turn + thread / settings.group;
    // Lanes without a pixel repeat the last one, so that all lanes of a warp take part in the shuffles.
    const bool inside = p < count;
    const int64_t at = (int64_t{grid.begin} + first + (inside ? p : count - 1)) * labels;
    float best = -INFINITY, sum = 0;
    for (int32_t c = lane; c < labels; c += settings.group) best = fmaxf(best, scores[at + c]);
    for (int step = settings.group / 2; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
    for (int32_t c = lane; c < labels; c += settings.group) sum += expf(scores[at + c] - best);
    for (int step = settings.group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    for (int32_t c = lane; inside && c < labels; c += settings.group) {
      out[at + c] = expf(scores[at + c] - best) / sum;
    }
  }
}

// The number of bits of numbers below n.
int bits_of(int64_t n) {
  int bits = 0;
  while (int64_t{1} << bits < n) ++bits;
  return bits;
}

RaggedShape expect_batch(const TensorView& offsets, const TensorView& shapes, int64_t pixels,
                         const CrfSettings& settings) {
  const RaggedShape batch = expect_ragged("dense_crf", offsets, shapes, pixels);
  expect_sigmas(batch, settings);
  if (pixels > INT32_MAX / (2 * kCorners)) throw std::invalid_argument("dense_crf: more than 178 million pixels");
  return batch;
}

// Images with the number of vertices before each; items(b): how many items of image b `chunks` counts.
template <class Count, class F>
void for_each_group_of_vertices(const RaggedShape& batch, const int32_t* counts, Count items, F f) {
  int64_t before = 0;
  for_each_group(batch, [&](const Images& group, int64_t) {
    VertexImages images = {group};
    for (int32_t i = 0; i < images.count; ++i) {
      images.before[i] = static_cast<int32_t>(before);
      before += counts[images.first + i];
      images.chunks[i + 1] = images.chunks[i] + static_cast<int32_t>(chunks_of(items(images.first + i)));
    }
    f(images, blocks_of(images));
  });
}

int64_t sum_of(const int32_t* counts, int64_t n) {
  int64_t sum = 0;
  for (int64_t b = 0; b < n; ++b) sum += counts[b];
  return sum;
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
  expect(op, "workspace", workspace, DType::kInt32, {49 * pixels + batch.count}, Device::kCUDA);
  const Corners corners(workspace, pixels);
  int32_t *const counts = status.as<int32_t>(), *const invalid = counts + batch.count;
  const OnDevice device(probabilities);
  check(cudaMemsetAsync(invalid, 0, sizeof(int32_t) * batch.count, static_cast<cudaStream_t>(stream.handle)));
  for_each_group(batch, [&](const Images& group, int64_t chunks) {
    ScaledImages images = {group};
    for (int32_t i = 0; i < kAxes * images.count; ++i) {
      const double sigma = settings.bilateral_sigma[images.first + i / kAxes];
      images.scale[i / kAxes][i % kAxes] = lattice_scale(i % kAxes, sigma, settings.bilateral_sigma_rgb);
    }
    launch(take_logs, chunks, kChunk, stream, images, static_cast<int32_t>(labels), probabilities.as<float>(),
           out.as<float>(), invalid);
    launch(embed, chunks, kChunk, stream, images, image.as<uint8_t>(), corners);
  });
  for_each_group(
      batch,
      [&](const Images& images, int64_t chunks) {
        launch(insert_corners, chunks, kChunk, stream, images, corners);
        launch(rank_vertices, chunks, kChunk, stream, images, corners);
        launch(add_ranks, images.count, 32, stream, images, corners.chunk_first, counts);
        launch(number_vertices, chunks, kChunk, stream, images, corners);
      },
      kCorners);
}

int64_t dense_crf_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                            int64_t labels, const CrfSettings& settings) {
  const int64_t pixels = offsets.as<int32_t>()[offsets.shape[0] - 1];
  const RaggedShape batch = expect_batch(offsets, shapes, pixels, settings);
  expect("dense_crf", "counts", counts, DType::kInt32, {batch.count});
  const Grids grids = lay_grids(batch, settings.gaussian_sigma);
  return Workspace(nullptr, pixels, sum_of(counts.as<int32_t>(), batch.count), labels, grids).size;
}

void dense_crf(const TensorView& offsets, const TensorView& shapes, const TensorView& out, const TensorView& status,
               const TensorView& counts, const TensorView& lattice_workspace, const TensorView& workspace,
               const CrfSettings& settings, Stream stream) {
  const char* op = "dense_crf";
  expect(op, "out", out, DType::kFloat32, {-1, -1}, Device::kCUDA);
  const int64_t pixels = out.shape[0], labels = out.shape[1];
  const RaggedShape batch = expect_batch(offsets, shapes, pixels, settings);
  expect(op, "status", status, DType::kInt32, {2, batch.count}, Device::kCUDA);
  expect(op, "counts", counts, DType::kInt32, {batch.count});
  expect(op, "lattice_workspace", lattice_workspace, DType::kInt32, {49 * pixels + batch.count}, Device::kCUDA);
  const Grids grids = lay_grids(batch, settings.gaussian_sigma);
  const int32_t* const vertices = counts.as<int32_t>();
  const Corners corners(lattice_workspace, pixels);
  Workspace work(workspace.as<int32_t>(), pixels, sum_of(vertices, batch.count), labels, grids);
  expect(op, "workspace", workspace, DType::kInt32, {work.size}, Device::kCUDA);
  if (pixels == 0 || labels == 0) return;
  if (std::max(grids.most, work.lattice.most_pieces()) * labels > INT32_MAX - kChunk) {
    throw std::invalid_argument("dense_crf: too many pixels times labels; give fewer images at a time");
  }
  const OnDevice device(out);
  const auto channels = static_cast<int32_t>(labels);

  Lattice& lattice = work.lattice;
  lattice.vertex = corners.vertex;
  lattice.weights = corners.weights;
  check(cudaMemsetAsync(lattice.neighbors, 0xff, sizeof(int32_t) * 2 * kCorners * lattice.vertices,
                        static_cast<cudaStream_t>(stream.handle)));
  for_each_group_of_vertices(
      batch, vertices, [&](int64_t b) { return vertices[b]; },
      [&](const VertexImages& images, int64_t chunks) {
        launch(join_vertices, chunks, kChunk, stream, images, status.as<int32_t>(), corners, lattice);
      });
  for_each_group_of_vertices(
      batch, vertices, [&](int64_t b) { return kCorners * batch.height(b) * batch.width(b); },
      [&](const VertexImages& images, int64_t chunks) {
        launch(number_through, chunks, kChunk, stream, images, corners);
      });
  // Keys and slots are no longer needed: entries are sorted in their memory, and only the weights remain.
  const int64_t entries = lattice.entries;
  auto* const room = reinterpret_cast<int32_t*>(corners.keys);
  const Sorted sorted = sort_numbers(corners.vertex, entries, bits_of(lattice.vertices), {room, room + entries},
                                     {room + 2 * entries, room + 3 * entries}, work.sorting, stream);
  lattice.sorted = sorted.numbers;
  lattice.sorted_weights = reinterpret_cast<float*>(corners.rank);
  launch(find_starts, chunks_of(entries), kChunk, stream, sorted.keys, lattice);
  launch(count_pieces, chunks_of(lattice.vertices + 1), kChunk, stream, lattice);
  exclusive_sum(lattice.pieces, lattice.vertices + 1, work.totals, stream);
  launch(assign_pieces, chunks_of(lattice.vertices), kChunk, stream, lattice);
  launch(sort_weights, chunks_of(entries), kChunk, stream, lattice);
  filter(lattice, 1, nullptr, stream);
  launch(normalize, chunks_of(pixels), kChunk, stream, lattice);
  launch(sort_weights, chunks_of(entries), kChunk, stream, lattice);

  for (const GridImages& group : grids.groups) {
    const GridImages images = with_chunks(group, Items::kTables, 1);
    launch(fill_tables, blocks_of(images), kChunk, stream, images, work.tables);
  }
  int32_t lanes = 1;
  while (lanes < 32 && lanes < channels) lanes *= 2;
  for (int64_t i = 0; i <= settings.iterations; ++i) {
    const bool messages = i > 0, last = i == settings.iterations;
    if (messages) {
      filter(lattice, channels, work.marginals, stream);
      for (const GridImages& group : grids.groups) {
        const GridImages halves = with_chunks(group, Items::kHalves, channels);
        const GridImages nodes = with_chunks(group, Items::kNodes, channels);
        launch(add_rows, blocks_of(halves), kChunk, stream, halves, work.tables, channels, work.marginals, work.halves);
        launch(add_columns, blocks_of(nodes), kChunk, stream, nodes, work.tables, channels, work.halves, work.nodes);
        launch(blur_nodes, blocks_of(nodes), kChunk, stream, nodes, work.tables, channels, false, work.nodes,
               work.other_nodes);
        launch(blur_nodes, blocks_of(nodes), kChunk, stream, nodes, work.tables, channels, true, work.other_nodes,
               work.nodes);
        launch(read_columns, blocks_of(halves), kChunk, stream, halves, work.tables, channels,
               static_cast<float>(settings.gaussian_weight), work.nodes, work.halves);
      }
    }
    const Update how = {channels, lanes, static_cast<float>(settings.bilateral_weight), messages};
    for (const GridImages& group : grids.groups) {
      const GridImages images = with_chunks(group, Items::kPixels, 1, kUpdatePixels);
      launch(update, blocks_of(images), kUpdateThreads, stream, images, lattice, how, work.tables, work.halves,
             out.as<float>(), work.marginals, last ? out.as<float>() : work.marginals);
    }
  }
}

}  // namespace namedmask::cuda
