// SPDX-License-Identifier: MIT
// Eigenvectors and k-means of spectral_clusters. The affinity is a matrix of rank C plus a constant,
// A = (F F' - m) / (M - m), so a product with it takes two products with the features F and one sum; once m and M are
// known (triton/spectral_clusters.py), no work of size n x n is left, only a long sequence of small steps. One thread
// block per image finds the eigenvectors one after another, each orthogonal to those before, so that multiple
// eigenvalues are found as often as they occur. Then every run of k-means has its own block.
#include <algorithm>
#include <climits>
#include <cmath>

#include "block.h"
#include "lanczos.h"
#include "launch.h"
#include "namedmask/spectral_clusters.h"

namespace namedmask::cuda {
namespace {

constexpr int kWarps = 16;      // per block that finds eigenvectors
constexpr int kRunWarps = 8;    // per block of k-means
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
  __host__ __device__ int64_t parts() const { return 4 * 32 * kWarps + channels; }
  __host__ __device__ int64_t run_size() const { return 1 + n + (n + 1) / 2; }
  __host__ __device__ int64_t size() const {
    return (1 + vectors + steps() + 2) * n + 6 * steps() + 1 + vectors + parts() + runs * run_size() + 1;
  }

  // The first of the known vectors is D^1/2 1; finally `points` [vectors, n] follow it.
  __device__ Lanczos<kWarps> lanczos(double* memory, int64_t known) const {
    double* product = memory + (1 + vectors + steps()) * n;
    return {n, n, known, smaller(steps(), n - known), memory, product, product + 2 * n};
  }
  __device__ double* inverse_root(double* memory) const { return memory + (2 + vectors + steps()) * n; }
  __device__ double* sums(double* memory) const {  // [channels], then the partial sums of threads
    return inverse_root(memory) + n + 6 * steps() + 1 + vectors;
  }
  __device__ double* found(double* memory) const { return sums(memory) + parts(); }
  // The sum of squared distances; distances [n]; labels int32 [n].
  __device__ double* run(double* memory, int64_t r) const { return found(memory) + 1 + r * run_size(); }
};

__device__ Work my_work(const Images& images, int32_t b, int64_t channels) {
  const int64_t n = images.length[b];
  return {n, channels, smaller(images.vectors, n > 1 ? n - 1 : 0), images.n_counts * kRestarts};
}

struct Affinity {
  const float* unit;  // [n, channels], unit vectors
  int32_t n, channels;
  double least, scale;
  double *inverse_root, *sums;

  // out = D^-1/2 A D^-1/2 q
  __device__ void multiply(const double* q, double* out) const {
    constexpr int32_t kThreads = 32 * kWarps;
    const auto thread = static_cast<int32_t>(threadIdx.x);
    double total = 0;
    for (int32_t i = thread; i < n; i += kThreads) total += inverse_root[i] * q[i];
    total = block_reduce<kWarps>(total, Sum());
    // sums = F' x: four channels per thread; remaining threads split the rows
    const int32_t quads = channels / 4;
    const int32_t groups = quads < kThreads ? kThreads / quads : 1;
    double* parts = sums + channels;
    for (int32_t c = thread % quads; c < quads && thread / quads < groups; c += kThreads) {
      double part[4] = {};
      for (int32_t i = thread / quads; i < n; i += groups) {
        const double x = inverse_root[i] * q[i];
        const float* f = unit + static_cast<int64_t>(i) * channels + 4 * c;
        for (int k = 0; k < 4; ++k) part[k] += f[k] * x;
      }
      double* to = groups > 1 ? parts + thread / quads * channels : sums;
      for (int k = 0; k < 4; ++k) to[4 * c + k] = part[k];
    }
    __syncthreads();
    if (groups > 1) {
      for (int32_t c = thread; c < channels; c += kThreads) {
        double sum = 0;
        for (int32_t g = 0; g < groups; ++g) sum += parts[g * channels + c];
        sums[c] = sum;
      }
      __syncthreads();
    }
    for (int32_t i = thread / 32; i < n; i += kWarps) {
      double sum = 0;
      for (int32_t c = thread % 32; c < channels; c += 32)
        sum += unit[static_cast<int64_t>(i) * channels + c] * sums[c];
      sum = warp_reduce(sum, Sum());
      if (thread % 32 == 0) out[i] = inverse_root[i] * scale * (sum - least * total);
    }
    __syncthreads();
  }
};

// Computes v_2, v_3, ... of each image, in place of the known vectors after the first, and their number.
__global__ void __launch_bounds__(32 * kWarps) embed(const __grid_constant__ Images images, const float* all_units,
                                                     int64_t channels, const float* ranges, double* workspace) {
  constexpr int64_t kThreads = 32 * kWarps;
  const auto b = static_cast<int32_t>(blockIdx.x);
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const Work work = my_work(images, b, channels);
  double* memory = workspace + images.work[b];
  const double least = ranges[2 * (images.first + b)], most = ranges[2 * (images.first + b) + 1];
  if (thread == 0) *work.found(memory) = 0;
  if (work.vectors == 0 || !(most - least >= kAlike)) return;
  const Affinity affinity = {all_units + images.begin[b] * channels,
                             images.length[b],
                             static_cast<int32_t>(channels),
                             least,
                             1 / (most - least),
                             work.inverse_root(memory),
                             work.sums(memory)};
  double* known = memory;
  double* product = work.lanczos(memory, 1).product;
  for (int64_t i = thread; i < work.n; i += kThreads) affinity.inverse_root[i] = known[i] = 1;
  __syncthreads();
  affinity.multiply(known, product);
  double squares = 0;
  for (int64_t i = thread; i < work.n; i += kThreads) {
    const bool joined = product[i] > kIsolated;
    known[i] = joined ? sqrt(product[i]) : 0;
    affinity.inverse_root[i] = joined ? 1 / known[i] : 0;
    squares += known[i] * known[i];
  }
  const double norm = sqrt(block_reduce<kWarps>(squares, Sum()));
  for (int64_t i = thread; i < work.n; i += kThreads) known[i] /= norm;
  __syncthreads();
  for (int64_t j = 0; j < work.vectors; ++j) {
    const Lanczos<kWarps> lanczos = work.lanczos(memory, 1 + j);
    const Pair pair = lanczos.solve(static_cast<uint64_t>(j * work.n), kTolerance,
                                    [&](const double* q) { affinity.multiply(q, product); });
    lanczos.vector(pair.products, product);  // every thread accesses only its own entries, here and in the next line
    for (int64_t i = thread; i < work.n; i += kThreads) known[(1 + j) * work.n + i] = product[i];
    __syncthreads();
  }
  for (int64_t j = 1; j <= work.vectors; ++j) {
    for (int64_t i = thread; i < work.n; i += kThreads) known[j * work.n + i] *= affinity.inverse_root[i];
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
  int64_t best = column * kRestarts;
  for (int64_t r = best + 1; r < (column + 1) * kRestarts && !alike; ++r) {
    if (*work.run(memory, r) < *work.run(memory, best)) best = r;
  }
  const auto* label = reinterpret_cast<const int32_t*>(work.run(memory, best) + 1 + work.n);
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
    launch(embed, count, 32 * kWarps, stream, images, unit.as<float>(), channels, ranges.as<float>(),
           workspace.as<double>());
    launch(run_kmeans, count * n_counts * kRestarts, 32 * kRunWarps, stream, images, channels, workspace.as<double>(),
           seed);
    launch(pick_run, count * n_counts, 32 * kRunWarps, stream, images, channels, workspace.as<double>(),
           labels.as<int32_t>());
  }
}

}  // namespace namedmask::cuda
