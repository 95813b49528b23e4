// SPDX-License-Identifier: MIT
// Eigenvectors and k-means of spectral_clusters. The affinity is a matrix of rank C plus a constant,
// A = (F F' - m) / (M - m), so a product with it takes two products with the features F and one sum; once m and M are
// known (triton/spectral_clusters.py), no work of size n x n is left, only a long sequence of small steps. A cluster
// of blocks (or one block) per image finds the eigenvectors one after another, each orthogonal to those before, so that
// multiple eigenvalues are found as often as they occur. Then every run of k-means has its own block.
#include <algorithm>
#include <climits>
#include <cmath>

#include "block.h"
#include "lanczos.h"
#include "namedmask/spectral_clusters.h"
#include "team.h"

namespace namedmask::cuda {
namespace {

// Find the eigenvectors of an image. 64 clusters of four blocks occupy two blocks of each of an H100
// SXM's multiprocessors.
using Cluster = Team<4, 8>;
using Block = Team<1, 16>;
constexpr int64_t kMostThreads = Cluster::kThreads;  // of a team
constexpr int kRunWarps = 8;                         // per block of k-means
constexpr int kMaxImages = 64;  // per launch: the table below must fit the 4 kB of a kernel's arguments
constexpr int kMaxCount = 64;
constexpr int64_t kMaxProducts = 192;  // per vector
constexpr int kRestarts = 10, kRounds = 100;
constexpr double kTolerance = 1e-8;  // a hundredth of the CPU's, since later vectors depend on earlier ones
constexpr double kAlike = 1e-6;      // affinities that differ by less count as equal
constexpr double kIsolated = 1e-6;   // smaller row sums count as 0

struct Images {
  int32_t first = 0;  // of the batch
  int32_t begin[kMaxImages] = {}, length[kMaxImages] = {};
  int64_t work[kMaxImages] = {};  // the first element of the image's part of the workspace
  int32_t counts[kMaxCount] = {};
  int32_t n_counts = 0, vectors = 0;  // vectors: the largest count minus 1
};

__host__ __device__ int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }

// The part of the workspace of an image.
struct Work {
  int64_t n, channels, vectors, runs;  // vectors: required number, at most n - 1

  __host__ __device__ int64_t steps() const { return smaller(kMaxProducts, n > 1 ? n - 1 : 0); }
  __host__ __device__ int64_t values() const { return 1 + vectors + steps(); }  // of a reduction
  __host__ __device__ int64_t run_size() const { return 1 + n + (n + 1) / 2; }
  __host__ __device__ int64_t size() const {
    return (values() + 2) * n + Lanczos<Block>::small_size(steps()) + Block::memory_size(values()) + sums_size() +
           runs * run_size() + 1;
  }

  // The first of the known vectors is D^1/2 1; finally `points` [vectors, n] follow it.
  template <class Team>
  __device__ Lanczos<Team> lanczos(Team& team, double* memory, int64_t known) const {
    return {team,
            static_cast<int32_t>(n),
            static_cast<int32_t>(known),
            static_cast<int32_t>(smaller(steps(), n - known)),
            n,
            memory,
            product(memory),
            inverse_root(memory) + n};
  }
  __device__ double* product(double* memory) const { return memory + values() * n; }
  __device__ double* inverse_root(double* memory) const { return product(memory) + n; }
  __device__ double* reductions(double* memory) const {
    return inverse_root(memory) + n + Lanczos<Block>::small_size(steps());
  }
  __device__ double* sums(double* memory) const { return reductions(memory) + Block::memory_size(values()); }
  // The sums of each block of a team, [channels], then those of groups of threads.
  __host__ __device__ int64_t sums_size() const { return Cluster::kBlocks * channels + 4 * kMostThreads + channels; }
  __device__ double* found(double* memory) const { return sums(memory) + sums_size(); }
  // The sum of squared distances; distances [n]; labels int32 [n].
  __device__ double* run(double* memory, int64_t r) const { return found(memory) + 1 + r * run_size(); }
};

__device__ Work my_work(const Images& images, int32_t b, int64_t channels) {
  const int64_t n = images.length[b];
  return {n, channels, smaller(images.vectors, n > 1 ? n - 1 : 0), images.n_counts * kRestarts};
}

struct alignas(16) Quad {
  float of[4];
};

template <class Team>
struct Affinity {
  static constexpr int kRows = 4;  // whose loads do not wait for each other

  Team& team;
  const float* unit;  // [n, channels], unit vectors
  int32_t n, channels;
  double least, scale;
  double *inverse_root, *sums;

  // Four channels of a row.
  __device__ Quad quad(int64_t row, int32_t c) const {
    return *reinterpret_cast<const Quad*>(unit + row * channels + 4 * c);
  }

  // out = D^-1/2 A D^-1/2 q; a thread accesses only its own entries (see lanczos.h). Features are read twice, upwards
  // and downwards, so that the second pass and the next product find the last ones in L2.
  __device__ void multiply(const double* q, double* out) const {
    const int32_t thread = Team::thread();
    double total = 0;
    for (int32_t i = thread; i < n; i += Team::kThreads) total += out[i] = inverse_root[i] * q[i];
    total = team.reduce(total, Sum());
    // parts = F' x: four channels per thread; groups of threads split the rows
    const int32_t quads = channels / 4;
    const int32_t groups = quads < Team::kThreads ? Team::kThreads / quads : 1;
    double* const parts = sums + Team::kBlocks * channels;
    for (int32_t c = thread % quads; c < quads && thread / quads < groups; c += Team::kThreads) {
      double part[4] = {};
      for (int32_t first = thread / quads; first < n; first += kRows * groups) {
        Quad f[kRows];
        double x[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int32_t i = first + j * groups, row = min(i, n - 1);
          f[j] = quad(row, c);
          x[j] = i < n ? out[row] : 0;
        }
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          for (int k = 0; k < 4; ++k) part[k] += f[j].of[k] * x[j];
        }
      }
      for (int k = 0; k < 4; ++k) parts[thread / quads * channels + 4 * c + k] = part[k];
    }
    Team::sync();
    double* const mine = sums + blockIdx.x % Team::kBlocks * channels;  // every block has its own copy
    for (auto c = static_cast<int32_t>(threadIdx.x); c < channels; c += Team::kBlockThreads) {
      double sum = 0;
#pragma unroll 4
      for (int32_t g = 0; g < groups; ++g) sum += parts[g * channels + c];
      mine[c] = sum;
    }
    __syncthreads();
    // out = F sums: a warp computes the 32 rows of its threads
    const int32_t lane = thread % 32;
    for (int32_t first = (n - 1) / Team::kThreads * Team::kThreads + thread - lane; first >= 0;
         first -= Team::kThreads) {
      if (first >= n) continue;
      double own = 0;
      for (int32_t r = 32 - kRows; r >= 0; r -= kRows) {
        double of_rows[kRows] = {};
        for (int32_t c = lane; c < quads; c += 32) {
          Quad f[kRows];
#pragma unroll
          for (int j = 0; j < kRows; ++j) f[j] = quad(min(first + r + j, n - 1), c);
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            for (int k = 0; k < 4; ++k) of_rows[j] += f[j].of[k] * mine[4 * c + k];
          }
        }
        for (int j = 0; j < kRows; ++j) {
          const double sum = warp_reduce(of_rows[j], Sum());
          if (lane == r + j) own = sum;
        }
      }
      const int32_t i = first + lane;
      if (i < n) out[i] = inverse_root[i] * scale * (own - least * total);
    }
  }
};

// Computes v_2, v_3, ... of each image, in place of the known vectors after the first, and their number.
template <class Team>
__global__ void __launch_bounds__(Team::kBlockThreads, Team::kBlockThreads <= 256 ? 2 : 1)
    embed(const __grid_constant__ Images images, const float* all_units, int64_t channels, const float* ranges,
          double* workspace) {
  const int32_t b = Team::number();
  const int32_t thread = Team::thread(), n = images.length[b];
  const Work work = my_work(images, b, channels);
  double* memory = workspace + images.work[b];
  const double least = ranges[2 * (images.first + b)], most = ranges[2 * (images.first + b) + 1];
  if (thread == 0) *work.found(memory) = 0;
  if (work.vectors == 0 || !(most - least >= kAlike)) return;
  Team team(work.reductions(memory), work.values());
  const Affinity<Team> affinity = {team,
                                   all_units + images.begin[b] * channels,
                                   n,
                                   static_cast<int32_t>(channels),
                                   least,
                                   1 / (most - least),
                                   work.inverse_root(memory),
                                   work.sums(memory)};
  double *known = memory, *product = work.product(memory);
  for (int32_t i = thread; i < n; i += Team::kThreads) affinity.inverse_root[i] = known[i] = 1;
  affinity.multiply(known, product);
  double squares = 0;
  for (int32_t i = thread; i < n; i += Team::kThreads) {
    const bool joined = product[i] > kIsolated;
    known[i] = joined ? sqrt(product[i]) : 0;
    affinity.inverse_root[i] = joined ? 1 / known[i] : 0;
    squares += known[i] * known[i];
  }
  const double norm = sqrt(team.reduce(squares, Sum()));
  for (int32_t i = thread; i < n; i += Team::kThreads) known[i] /= norm;
  for (int64_t j = 0; j < work.vectors; ++j) {
    const Lanczos<Team> lanczos = work.lanczos(team, memory, 1 + j);
    const Pair pair = lanczos.solve(static_cast<uint64_t>(j * work.n), kTolerance,
                                    [&](const double* q) { affinity.multiply(q, product); });
    lanczos.vector(pair.products, product);
    for (int32_t i = thread; i < n; i += Team::kThreads) known[(1 + j) * work.n + i] = product[i];
  }
  for (int64_t j = 1; j <= work.vectors; ++j) {
    for (int32_t i = thread; i < n; i += Team::kThreads) known[j * work.n + i] *= affinity.inverse_root[i];
  }
  if (thread == 0) *work.found(memory) = static_cast<double>(work.vectors);
}

// Uniform in [0, 1).
class Random {
 public:
  __device__ Random(int64_t seed, int64_t k, int64_t run)
      : state_(mix(mix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(k * kRestarts + run) + kMixStep)) {}
  __device__ double next() { return static_cast<double>(mix(state_ += kMixStep) >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

// One run of k-means; see spectral_clusters.h.
__global__ void __launch_bounds__(32 * kRunWarps)
    run_kmeans(const __grid_constant__ Images images, int64_t channels, double* workspace, int64_t seed) {
  constexpr int32_t kThreads = 32 * kRunWarps;
  __shared__ double centers[kMaxCount * (kMaxCount - 1)];
  __shared__ double parts[kThreads];
  __shared__ int32_t chosen;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto runs = static_cast<int32_t>(images.n_counts * kRestarts), r = static_cast<int32_t>(blockIdx.x % runs);
  const auto b = static_cast<int32_t>(blockIdx.x / runs);
  const Work work = my_work(images, b, channels);
  double* memory = workspace + images.work[b];
  const int32_t n = images.length[b], k = images.counts[r / kRestarts];
  const int32_t dims = min(k - 1, static_cast<int32_t>(*work.found(memory)));
  if (dims == 0) return;
  const double* points = memory + n;  // [dims, n]
  double *least = work.run(memory, r), *distance = least + 1;
  auto* label = reinterpret_cast<int32_t*>(distance + n);
  const auto squared_distance = [&](int32_t i, int32_t center) {
    double sum = 0;
    for (int32_t d = 0; d < dims; ++d) {
      const double step = points[static_cast<int64_t>(d) * n + i] - centers[center * dims + d];
      sum += step * step;
    }
    return sum;
  };

  // k-means++: each next center is a token drawn with probability proportional to the squared distance to the others
  Random random(seed, k, r % kRestarts);
  int32_t count = 0, token = min(n - 1, static_cast<int32_t>(random.next() * n));
  const int32_t per = (n + kThreads - 1) / kThreads, begin = min(n, thread * per), end = min(n, begin + per);
  while (true) {
    for (int32_t d = thread; d < dims; d += kThreads)
      centers[count * dims + d] = points[static_cast<int64_t>(d) * n + token];
    __syncthreads();
    double part = 0;
    for (int32_t i = begin; i < end; ++i) {
      const double here = squared_distance(i, count);
      distance[i] = count ? min(distance[i], here) : here;
      part += distance[i];
    }
    parts[thread] = part;
    if (++count == k) break;
    const double total = block_reduce<kRunWarps>(part, Sum());
    if (!(total > 0)) break;  // all points are centers
    const double threshold = random.next() * total;
    if (thread == 0) {
      double sum = 0;
      int32_t t = 0;
      while (t + 1 < kThreads && sum + parts[t] <= threshold) sum += parts[t++];
      int32_t i = min(n - 1, t * per);
      while (i + 1 < n && (sum += distance[i]) <= threshold) ++i;
      chosen = i;
    }
    __syncthreads();
    token = chosen;
  }

  // Lloyd's algorithm
  double sum = 0;
  for (int32_t round = 0;; ++round) {
    __syncthreads();
    int32_t changed = 0;
    sum = 0;
    for (int32_t i = thread; i < n; i += kThreads) {
      double best = INFINITY;
      int32_t nearest = 0;
      for (int32_t c = 0; c < count; ++c) {
        const double here = squared_distance(i, c);
        if (here < best) best = here, nearest = c;
      }
      changed += round == 0 || label[i] != nearest;
      label[i] = nearest;
      sum += best;
    }
    if (block_reduce<kRunWarps>(changed, Sum()) == 0 || round == kRounds) break;
    for (int32_t pair = thread / 32; pair < count * dims; pair += kRunWarps) {
      double total = 0;
      int32_t size = 0;
      for (int32_t i = thread % 32; i < n; i += 32) {
        if (label[i] == pair / dims) total += points[static_cast<int64_t>(pair % dims) * n + i], ++size;
      }
      total = warp_reduce(total, Sum());
      size = warp_reduce(size, Sum());
      if (size && thread % 32 == 0) centers[pair] = total / size;
    }
  }
  sum = block_reduce<kRunWarps>(sum, Sum());
  if (thread == 0) *least = sum;
}

// Picks the best run for one image and k, the first among equals, and numbers its labels in the order of occurrence.
__global__ void __launch_bounds__(32 * kRunWarps)
    pick_run(const __grid_constant__ Images images, int64_t channels, double* workspace, int32_t* all_labels) {
  constexpr int64_t kThreads = 32 * kRunWarps;
  __shared__ int32_t first[kMaxCount];
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const auto b = static_cast<int32_t>(blockIdx.x / images.n_counts);
  const int64_t column = blockIdx.x % images.n_counts;
  const Work work = my_work(images, b, channels);
  double* memory = workspace + images.work[b];
  int32_t* labels = all_labels + images.begin[b] * static_cast<int64_t>(images.n_counts) + column;
  const bool alike = images.counts[column] == 1 || *work.found(memory) == 0;
  const double* best = work.run(memory, column * kRestarts);
  for (int64_t r = 1; r < kRestarts && !alike; ++r) {
    const double* run = work.run(memory, column * kRestarts + r);
    if (*run < *best) best = run;
  }
  const auto* label = reinterpret_cast<const int32_t*>(best + 1 + work.n);
  if (thread < kMaxCount) first[thread] = INT_MAX;
  __syncthreads();
  for (int64_t i = thread; i < work.n && !alike; i += kThreads) atomicMin(&first[label[i]], static_cast<int32_t>(i));
  __syncthreads();
  for (int64_t i = thread; i < work.n; i += kThreads) {
    int32_t number = 0;
    for (int c = 0; c < kMaxCount && !alike; ++c) number += first[c] < first[label[i]];
    labels[i * images.n_counts] = number;
  }
}

Work work_of(const RaggedShape& batch, int64_t b, const TensorView& counts, int64_t channels) {
  int64_t vectors = 0;
  for (int64_t c = 0; c < counts.shape[0]; ++c) vectors = std::max<int64_t>(vectors, counts.as<int32_t>()[c] - 1);
  const int64_t n = batch.end(b) - batch.begin(b);
  return {n, channels, smaller(vectors, n > 1 ? n - 1 : 0), counts.shape[0] * kRestarts};
}

}  // namespace

int64_t spectral_clusters_workspace(const TensorView& offsets, const TensorView& shapes, const TensorView& counts,
                                    int64_t tokens, int64_t channels) {
  const RaggedShape batch = expect_ragged("spectral_clusters", offsets, shapes, tokens);
  int64_t size = 0;
  for (int64_t b = 0; b < batch.count; ++b) size += work_of(batch, b, counts, channels).size();
  return size;
}

void spectral_clusters(const TensorView& unit, const TensorView& ranges, const TensorView& offsets,
                       const TensorView& shapes, const TensorView& counts, const TensorView& labels,
                       const TensorView& workspace, int64_t seed, Stream stream) {
  const char* op = "spectral_clusters";
  expect(op, "unit", unit, DType::kFloat32, {-1, -1}, Device::kCUDA);
  expect(op, "counts", counts, DType::kInt32, {-1});
  const int64_t tokens = unit.shape[0], channels = unit.shape[1], n_counts = counts.shape[0];
  const RaggedShape batch = expect_ragged(op, offsets, shapes, tokens);
  expect(op, "ranges", ranges, DType::kFloat32, {batch.count, 2}, Device::kCUDA);
  expect(op, "labels", labels, DType::kInt32, {tokens, n_counts}, Device::kCUDA);
  expect(op, "workspace", workspace, DType::kFloat64,
         {spectral_clusters_workspace(offsets, shapes, counts, tokens, channels)}, Device::kCUDA);
  if (channels % 4 != 0 || n_counts > kMaxCount) {
    throw std::invalid_argument(std::string(op) +
                                ": channels must be a multiple of 4, and there must be at most 64 counts");
  }
  const OnDevice device(unit);
  const bool in_clusters = has_clusters(embed<Cluster>);
  int64_t doubles = 0;
  for (int64_t first = 0; first < batch.count; first += kMaxImages) {
    Images images;
    images.first = static_cast<int32_t>(first);
    images.n_counts = static_cast<int32_t>(n_counts);
    for (int64_t c = 0; c < n_counts; ++c) {
      images.counts[c] = counts.as<int32_t>()[c];
      images.vectors = std::max(images.vectors, images.counts[c] - 1);
    }
    const int64_t count = std::min<int64_t>(kMaxImages, batch.count - first);
    for (int64_t i = 0; i < count; ++i) {
      images.begin[i] = static_cast<int32_t>(batch.begin(first + i));
      images.length[i] = static_cast<int32_t>(batch.end(first + i) - batch.begin(first + i));
      images.work[i] = doubles;
      doubles += work_of(batch, first + i, counts, channels).size();
    }
    if (in_clusters) {
      launch_clusters(embed<Cluster>, count, Cluster::kBlocks, Cluster::kBlockThreads, stream, images, unit.as<float>(),
                      channels, ranges.as<float>(), workspace.as<double>());
    } else {
      launch(embed<Block>, count, Block::kBlockThreads, stream, images, unit.as<float>(), channels, ranges.as<float>(),
             workspace.as<double>());
    }
    launch(run_kmeans, count * n_counts * kRestarts, 32 * kRunWarps, stream, images, channels, workspace.as<double>(),
           seed);
    launch(pick_run, count * n_counts, 32 * kRunWarps, stream, images, channels, workspace.as<double>(),
           labels.as<int32_t>());
  }
}

}  // namespace namedmask::cuda
