// SPDX-License-Identifier: MIT
// Pixels of different spatial cells never share a vertex. Every spatial cell therefore has its own hash table of color
// keys, with twice as many slots as the cell has pixels:
//
//   key_pixels        color keys; the largest |target| of every image
//   insert_pixels     a slot for each key, which finally holds the key's first pixel in raster order
//   rank_vertices -> add_ranks -> splat    numbers vertices in the order of their first pixels; sums
//   join_vertices     neighbors, by looking up their keys
//   solve             bistochastization and conjugate gradients, one cluster of blocks (or one block) per image
//   slice
//
// Threads race for the slots, but results do not depend on the outcome: the first pixel of a key is a minimum, targets
// are added as integers, and the solver's sums have a fixed order. Results are bit-identical in every run.
#include <cmath>
#include <utility>

#include "bilateral_grid.h"
#include "cluster.h"
#include "hash_table.h"
#include "images.h"
#include "namedmask/bilateral_solver.h"
#include "scale.h"

namespace namedmask::cuda {
namespace {

constexpr int kDirections = 10;                              // both ways along five axes
constexpr int kClusterBlocks = 8;                            // the most that every device with clusters runs
constexpr int kClusterThreads = 256, kSolverThreads = 1024;  // per block that solves, in a cluster or alone
constexpr int kPartialSums = kClusterBlocks * kClusterThreads;
constexpr unsigned kInfinity = 0x7f800000;  // the bits of float infinity; absolute values have the order of their bits

// With the cell size of each.
struct SpatialImages : Images {
  double sigma[kMaxImages] = {};
};

typedef unsigned long long Fixed;  // two's complement; unsigned, as atomicAdd requires

// Sums of the warps that solve an image. Two of each in turn, so that a barrier after they have been written is enough.
struct WarpSums {
  double sums[2][3][kPartialSums / 32];
};
constexpr int64_t kWordsOfSums = sizeof(WarpSums) / sizeof(int32_t);

// The scratch memory of a call: arrays over all pixels P; an image's part has room for its vertices. The solver reuses
// the memory in which the grid was built.
struct Workspace {
  Workspace(const TensorView& workspace, int64_t pixels, int64_t images, bool has_confidences) {
    auto* next = workspace.as<int32_t>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    warp_sums = reinterpret_cast<WarpSums*>(take(std::min<int64_t>(images, kMaxImages) * kWordsOfSums));
    auto* const sum_of_confidences = reinterpret_cast<Fixed*>(take(2 * pixels));
    weights = has_confidences ? sum_of_confidences : nullptr;
    int32_t* const shared = take(7 * pixels);
    sums = reinterpret_cast<Fixed*>(shared);
    table = shared + 2 * pixels;
    key = shared + 4 * pixels;
    first = shared + 5 * pixels;
    rank = shared + 6 * pixels;
    for (int i = 0; i < 7; ++i) scratch[i] = reinterpret_cast<float*>(shared + i * pixels);
    vertex_of_pixel = take(pixels);
    neighbors = take(kDirections * pixels);
    mass = take(pixels);
    value = reinterpret_cast<float*>(take(pixels));
    counts = take(images);
    extremes = reinterpret_cast<unsigned*>(take(images));
    chunk_first = take(pixels / kChunk + images);
  }

  // While the grid is built:
  Fixed* sums;     // [P]: of the target, by vertex
  int32_t* table;  // [2 P]: slots; those of a cell are consecutive
  int32_t* key;    // [P]: of a pixel's color
  int32_t* first;  // [P]: first pixel of a vertex
  int32_t* rank;   // [P]: of a vertex's first pixel among those of its chunk
  // While the solver runs:
  float* scratch[7];    // [P] each
  WarpSums* warp_sums;  // of the images of a launch
  // Throughout:
  int32_t* vertex_of_pixel;  // [P]; until the vertices are numbered, the pixel's slot
  int32_t* neighbors;        // [image: kDirections, vertices]; kNone: none
  Fixed* weights;            // [P]: sum of the confidences of a vertex; null: all pixels have the same
  int32_t* mass;             // [P]: number of pixels of a vertex
  float* value;              // [P]: weighted mean target of a vertex, finally the solution
  int32_t* counts;           // [B]: number of vertices
  unsigned* extremes;        // [B]: bits of the largest |target|
  int32_t* chunk_first;      // number of vertices in the chunks before this one
};

// The slots of a cell.
__device__ Region cell_at(const Image& image, int32_t column, int32_t row, double sigma) {
  const int32_t x = first_pixel(column, sigma), x_end = min(first_pixel(column + 1, sigma), image.width);
  const int32_t y = first_pixel(row, sigma), y_end = min(first_pixel(row + 1, sigma), image.height);
  return {2 * (y * image.width + (y_end - y) * x), 2 * (y_end - y) * (x_end - x)};
}

__device__ FirstTable table_of(const Image& image, const Workspace& work) {
  return {work.table + 2 * int64_t{image.begin}, work.key + image.begin};
}

// The factor that converts targets to integers: the power of two for which the largest target leaves just enough of 62
// bits that no sum over the image overflows. The sum of equal floats is exact.
__device__ double fixed_scale(unsigned extreme, int32_t pixels) {
  const int exponent = max(static_cast<int>(extreme >> 23), 1) - 126;  // |target| < 2^exponent
  return ldexp(1.0, 62 - exponent - (32 - __clz(pixels)));
}

// The factor that converts confidences, or back.
__device__ double weight_scale(int32_t pixels) { return fixed_scale(__float_as_uint(1.0f), pixels); }

// Reads 7 bytes per pixel and writes 24; about 60 operations in double.
__global__ void __launch_bounds__(kChunk)
    key_pixels(const __grid_constant__ Images images, const __grid_constant__ ColorGrid grid, const float* target,
               const uint8_t* rgb, const float* confidence, const __grid_constant__ Workspace work) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  unsigned extreme = 0;
  if (pixel < image.pixels()) {
    const int64_t at = int64_t{image.begin} + pixel;
    work.key[at] = grid.key(rgb[3 * at], rgb[3 * at + 1], rgb[3 * at + 2]);
    work.table[2 * at] = work.table[2 * at + 1] = kNone;
    work.sums[at] = 0;
    work.mass[at] = 0;
    extreme = __float_as_uint(target[at]) & 0x7fffffff;
    if (work.weights) {
      work.weights[at] = 0;
      if (!(confidence[at] >= 0 && confidence[at] <= 1)) extreme = kInfinity;
    }
  }
  extreme = warp_reduce(extreme, Most());
  unsigned* const greatest = &work.extremes[image.index];
  // It only grows: reading a possibly old value first saves most of the atomics.
  if (threadIdx.x % 32 == 0 && extreme > *const_cast<volatile unsigned*>(greatest)) atomicMax(greatest, extreme);
}

// A few random accesses of 4 bytes per pixel, nearly all in L2: only a sixth as many slots as pixels are in use.
__global__ void __launch_bounds__(kChunk)
    insert_pixels(const __grid_constant__ SpatialImages images, const __grid_constant__ Workspace work) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const double sigma = images.sigma[place];
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const Region cell =
      cell_at(image, spatial_cell(pixel % image.width, sigma), spatial_cell(pixel / image.width, sigma), sigma);
  work.vertex_of_pixel[image.begin + pixel] =
      static_cast<int32_t>(cell.begin) + table_of(image, work).insert(cell, pixel);
}

__global__ void __launch_bounds__(kChunk)
    rank_vertices(const __grid_constant__ Images images, const __grid_constant__ Workspace work) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  const bool inside = pixel < image.pixels();
  const int64_t at = int64_t{image.begin} + pixel;
  const int32_t* const slots = table_of(image, work).slots;
  const int32_t rank = rank_in_chunk(inside && slots[work.vertex_of_pixel[at]] == pixel, &work.chunk_first[blockIdx.x]);
  if (inside) work.rank[at] = rank;
}

// Two atomics per pixel, about 17 per address.
__global__ void __launch_bounds__(kChunk) splat(const __grid_constant__ Images images, const float* target,
                                                const float* confidence, const __grid_constant__ Workspace work) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const int64_t at = int64_t{image.begin} + pixel;
  const int32_t first = table_of(image, work).slots[work.vertex_of_pixel[at]];
  const int32_t chunk = static_cast<int32_t>(blockIdx.x) - image.block + first / kChunk;
  const int32_t vertex = work.chunk_first[chunk] + work.rank[image.begin + first];
  work.vertex_of_pixel[at] = vertex;
  if (first == pixel) work.first[image.begin + vertex] = pixel;
  atomicAdd(&work.mass[image.begin + vertex], 1);
  const unsigned extreme = work.extremes[image.index];
  if (extreme >= kInfinity) return;
  const double own = work.weights ? double{confidence[at]} : 1.0;
  const int64_t fixed = llrint(own * target[at] * fixed_scale(extreme, image.pixels()));
  atomicAdd(&work.sums[image.begin + vertex], static_cast<Fixed>(fixed));
  if (work.weights) {
    const int64_t weight = llrint(own * weight_scale(image.pixels()));
    atomicAdd(&work.weights[image.begin + vertex], static_cast<Fixed>(weight));
  }
}

__global__ void __launch_bounds__(kChunk, 1)
    join_vertices(const __grid_constant__ SpatialImages images, const __grid_constant__ ColorGrid grid,
                  const __grid_constant__ Workspace work) {
  const int place = my_place(images, images.chunks);
  const Image image = image_at(images, images.chunks, place);
  const double sigma = images.sigma[place];
  const int32_t vertex = image.chunk_item(), count = work.counts[image.index];
  if (vertex >= count) return;
  const int64_t at = int64_t{image.begin} + vertex;
  const unsigned extreme = work.extremes[image.index];
  const double sum = static_cast<double>(static_cast<int64_t>(work.sums[at])) / fixed_scale(extreme, image.pixels());
  const float scale = scale_of(__uint_as_float(extreme));
  const double weight =
      work.weights ? static_cast<double>(work.weights[at]) / weight_scale(image.pixels()) : work.mass[at];
  const float mean = weight > 0 ? static_cast<float>(sum / weight) : 0;  // `solve` sets it without a weight
  work.value[at] = extreme < kInfinity ? mean * scale : NAN;

  const FirstTable table = table_of(image, work);
  const int32_t pixel = work.first[at], key = table.keys[pixel];
  const int32_t column = spatial_cell(pixel % image.width, sigma), row = spatial_cell(pixel / image.width, sigma);
  int32_t* neighbor = work.neighbors + kDirections * int64_t{image.begin} + vertex;
  const auto join = [&](int32_t first) {
    *neighbor = first == kNone ? kNone : work.vertex_of_pixel[image.begin + first];
    neighbor += count;
  };
  const Region cell = cell_at(image, column, row, sigma);
  for (int i = 0; i < 3; ++i) {
    join(table.find(cell, key - grid.steps[i]));
    join(table.find(cell, key + grid.steps[i]));
  }
  const auto beside = [&](int32_t x, int32_t y) {
    const bool there = x >= 0 && y >= 0 && first_pixel(x, sigma) < image.width && first_pixel(y, sigma) < image.height;
    join(there ? table.find(cell_at(image, x, y, sigma), key) : kNone);
  };
  beside(column - 1, row);
  beside(column + 1, row);
  beside(column, row - 1);
  beside(column, row + 1);
}

struct Solver {
  double confidence, smoothness, tolerance;
  int64_t iterations;
};

// csrc/cpu/bilateral_solver_kernel.h explains the equations and their scaling.
//
// An iteration reads and writes about 100 bytes per vertex, 2 MB for an image of 512 x 683, in L2 as long as the
// running images fit; the array that neighbors read, 4 bytes per vertex, fits L1. On an H100, one block took 3 ms per
// image and its L1 was busy for 53% of that. A cluster of blocks has the L1 of as many multiprocessors, but each of its
// barriers empties them (CCTL.IVALL): only neighbors read between two barriers are found there. No GPU has run it yet.
template <int kBlocks, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocks == 1 ? 1 : 2)
    solve(const __grid_constant__ Images images, const __grid_constant__ Solver solver,
          const __grid_constant__ Workspace work) {
  constexpr int kTogether = kBlocks * kThreads;  // threads of an image
  constexpr int kAtOnce = kBlocks == 1 ? 1 : 4;  // vertices of a thread whose loads do not wait for each other
  const auto place = static_cast<int32_t>(blockIdx.x) / kBlocks;
  const int32_t thread = static_cast<int32_t>(blockIdx.x) % kBlocks * kThreads + static_cast<int32_t>(threadIdx.x);
  const int32_t count = work.counts[images.first + place];
  const int64_t begin = images.begin[place];
  const int32_t* const mass = work.mass + begin;
  const int32_t* const neighbors = work.neighbors + kDirections * begin;
  float *const value = work.value + begin, *const w = work.scratch[0] + begin,
               *const diagonal = work.scratch[1] + begin;
  float *const residual = work.scratch[2] + begin, *const direction = work.scratch[3] + begin;
  float* const product = work.scratch[4] + begin;  // of the matrix and the direction
  float* const change = work.scratch[5] + begin;
  float* const weighted = work.scratch[6] + begin;  // w * direction, read by neighbors
  const auto smoothness = static_cast<float>(solver.smoothness), confidence = static_cast<float>(solver.confidence);

  const auto sync = [] {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  };
  // Calls use(v, load(v)) for the vertices first, first + step, ... `load` may only read what `use` does not write for
  // other vertices.
  const auto for_each_from = [&](int32_t first, int32_t step, auto load, auto use) {
    for (; first < count; first += kAtOnce * step) {
      decltype(load(0)) loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) loaded[i] = load(min(first + i * step, count - 1));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t v = first + i * step;
        if (v < count) use(v, loaded[i]);
      }
    }
  };
  const auto for_each_vertex = [&](auto load, auto use) { for_each_from(thread, kTogether, load, use); };
  // The same, with use(v, load(v), totals), which adds to `totals`. Each of these is the sum over every kPartialSums-th
  // vertex, over the lanes of a warp, and over warps, and does not depend on kBlocks. What was written before is then
  // visible to all threads.
  int turn = 0;
  const auto sum_over_vertices = [&](auto& totals, auto load, auto use) {
    constexpr int kCount = sizeof(totals) / sizeof(totals[0]);
    auto& of_warps = work.warp_sums[place].sums[turn];
    turn ^= 1;
    for (int32_t first = thread; first < kPartialSums; first += kTogether) {
      double sums[kCount] = {};
      for_each_from(first, kPartialSums, load, [&](int32_t v, auto loaded) { use(v, loaded, sums); });
      for (int i = 0; i < kCount; ++i) {
        const double of_warp = warp_reduce(sums[i], Sum());
        if (first % 32 == 0) of_warps[i][first / 32] = of_warp;
      }
    }
    sync();
    for (int i = 0; i < kCount; ++i) {
      double sum = 0;
      for (int32_t warp = thread % 32; warp < kPartialSums / 32; warp += 32) sum += of_warps[i][warp];
      totals[i] = warp_reduce(sum, Sum());
    }
  };
  const auto over_neighbors = [&](int32_t vertex, auto term) {
    float terms[kDirections];
#pragma unroll
    for (int d = 0; d < kDirections; ++d) {
      const int32_t near = neighbors[d * int64_t{count} + vertex];
      terms[d] = 0;
      if (near != kNone) terms[d] = term(near);
    }
    float sum = 0;
#pragma unroll
    for (int d = 0; d < kDirections; ++d) sum += terms[d];
    return sum;
  };
  const auto nothing = [](int32_t) { return 0; };

  const Fixed* const weights = work.weights ? work.weights + begin : nullptr;
  const double unit = weight_scale(images.height[place] * images.width[place]);
  if (weights) {  // vertices without confidence start at the image's mean
    double totals[2];
    sum_over_vertices(totals, nothing, [&](int32_t v, int, double* sums) {
      const double weight = static_cast<double>(weights[v]) / unit;
      sums[0] += weight * value[v];
      sums[1] += weight;
    });
    const auto mean = static_cast<float>(totals[1] > 0 ? totals[0] / totals[1] : totals[0]);
    for_each_vertex(nothing, [&](int32_t v, int) {
      if (weights[v] == 0) value[v] += mean;  // from 0; NaN stays
    });
  }
  float *n = product, *next = change;
  for_each_vertex(nothing, [&](int32_t v, int) { n[v] = 1; });
  for (int round = 0; round < 10; ++round) {
    sync();
    struct Row {
      float own, mass, sum;
    };
    for_each_vertex(
        [&](int32_t v) {
          return Row{n[v], static_cast<float>(mass[v]), over_neighbors(v, [&](int32_t near) { return n[near]; })};
        },
        [&](int32_t v, Row row) { next[v] = sqrtf(row.own * row.mass / (10 * row.own + row.sum)); });
    float* const swap = n;
    n = next;
    next = swap;
  }
  sync();
  double starts[3];
  sum_over_vertices(starts, nothing, [&](int32_t v, int, double* sums) {
    const float own = n[v], mean = value[v],
                weight = weights ? fmaxf(static_cast<float>(static_cast<double>(weights[v]) / unit), kLeastWeight)
                                 : confidence * static_cast<float>(mass[v]);
    float around = 0;
    const float pull = over_neighbors(v, [&](int32_t near) {
      around += n[near];
      return n[near] * (value[near] - mean);
    });
    const float d = smoothness * own * around + weight, plain = smoothness * own * pull, r = plain / sqrtf(d);
    diagonal[v] = d;
    residual[v] = r;
    w[v] = own * sqrtf(smoothness / d);
    direction[v] = 0;
    const double b = weight * mean;
    sums[0] += b * b;
    sums[1] += double{plain} * plain;
    sums[2] += double{r} * r;
  });
  for_each_vertex(nothing, [&](int32_t v, int) { change[v] = 0; });

  const double enough = solver.tolerance * solver.tolerance * starts[0];
  double norm = starts[1], rho = starts[2], before = 1;
  for (int64_t step = 0; step < solver.iterations && norm > enough; ++step) {
    const float beta = step == 0 ? 0.0f : static_cast<float>(rho / before);
    struct Direction {
      float value, weight;
    };
    for_each_vertex([&](int32_t v) { return Direction{residual[v] + beta * direction[v], w[v]}; },
                    [&](int32_t v, Direction p) {
                      direction[v] = p.value;
                      weighted[v] = p.weight * p.value;
                    });
    sync();
    double curvature[1];
    struct Product {
      float p, q;
    };
    sum_over_vertices(
        curvature,
        [&](int32_t v) {
          const float sum = over_neighbors(v, [&](int32_t near) { return weighted[near]; });
          const float p = direction[v];
          return Product{p, p - w[v] * sum};
        },
        [&](int32_t v, Product pq, double* sums) {
          product[v] = pq.q;
          sums[0] += double{pq.p} * pq.q;
        });
    if (!(curvature[0] > 0)) break;  // the residual has underflowed
    const auto length = static_cast<float>(rho / curvature[0]);
    double norms[2];
    struct Step {
      float change, residual, diagonal;
    };
    sum_over_vertices(
        norms,
        [&](int32_t v) {
          return Step{change[v] + length * direction[v], residual[v] - length * product[v], diagonal[v]};
        },
        [&](int32_t v, Step to, double* sums) {
          change[v] = to.change;
          const float r = to.residual;
          residual[v] = r;
          sums[0] += double{r} * r;
          sums[1] += double{r * to.diagonal} * r;
        });
    before = rho;
    rho = norms[0];
    norm = norms[1];
  }
  for_each_vertex([&](int32_t v) { return value[v] + change[v] / sqrtf(diagonal[v]); },
                  [&](int32_t v, float solution) { value[v] = solution; });
}

__global__ void __launch_bounds__(kChunk)
    slice(const __grid_constant__ Images images, const __grid_constant__ Workspace work, float* out) {
  const Image image = my_image(images, images.chunks);
  const int32_t pixel = image.chunk_item();
  if (pixel >= image.pixels()) return;
  const float value = work.value[image.begin + work.vertex_of_pixel[image.begin + pixel]];
  out[image.begin + pixel] = unscaled(value, scale_of(__uint_as_float(work.extremes[image.index])));
}

}  // namespace

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& confidence,
                      const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                      const TensorView& workspace, const BilateralSettings& settings, Stream stream) {
  const char* op = "bilateral_solver";
  expect(op, "target", target, DType::kFloat32, {-1}, Device::kCUDA);
  const int64_t pixels = target.shape[0];
  expect(op, "image", image, DType::kUInt8, {pixels, 3}, Device::kCUDA);
  const bool has_confidences = confidence.shape[0] != 0;
  expect(op, "confidence", confidence, DType::kFloat32, {has_confidences ? pixels : 0}, Device::kCUDA);
  expect(op, "out", out, DType::kFloat32, {pixels}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, pixels);
  const int64_t size = 23 * pixels + 3 * batch.count + kWordsOfSums * std::min<int64_t>(batch.count, kMaxImages);
  expect(op, "workspace", workspace, DType::kInt32, {size}, Device::kCUDA);
  expect_cells(settings, batch.count);
  for (int64_t b = 0; b < batch.count; ++b) {
    if (batch.height(b) * batch.width(b) > INT32_MAX / 2) {
      throw std::invalid_argument("bilateral_solver: image " + std::to_string(b) + " has more than 2^30 pixels");
    }
  }
  const Workspace work(workspace, pixels, batch.count, has_confidences);
  const ColorGrid grid(settings);
  const Solver solver = {settings.confidence, settings.smoothness, settings.tolerance, settings.iterations};
  const OnDevice device(target);
  const auto cluster_solve = solve<kClusterBlocks, kClusterThreads>;
  const bool in_clusters = has_clusters(cluster_solve);
  check(cudaMemsetAsync(work.extremes, 0, sizeof(*work.extremes) * batch.count,
                        static_cast<cudaStream_t>(stream.handle)));
  for_each_group(batch, [&](const Images& group, int64_t chunks) {
    SpatialImages images = {group};
    for (int32_t i = 0; i < images.count; ++i) images.sigma[i] = settings.sigma_spatial[images.first + i];
    launch(key_pixels, chunks, kChunk, stream, images, grid, target.as<float>(), image.as<uint8_t>(),
           confidence.as<float>(), work);
    launch(insert_pixels, chunks, kChunk, stream, images, work);
    launch(rank_vertices, chunks, kChunk, stream, images, work);
    launch(add_ranks, images.count, 32, stream, images, work.chunk_first, work.counts);
    launch(splat, chunks, kChunk, stream, images, target.as<float>(), confidence.as<float>(), work);
    launch(join_vertices, chunks, kChunk, stream, images, grid, work);
    if (in_clusters) {
      launch_clusters(cluster_solve, images.count, kClusterBlocks, kClusterThreads, stream, images, solver, work);
    } else {
      launch(solve<1, kSolverThreads>, images.count, kSolverThreads, stream, images, solver, work);
    }
    launch(slice, chunks, kChunk, stream, images, work, out.as<float>());
  });
}

}  // namespace namedmask::cuda
