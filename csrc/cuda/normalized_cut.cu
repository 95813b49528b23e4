// SPDX-License-Identifier: MIT
// The eigenvector of an image's affinity and the results derived from it, in one launch: one cluster of blocks, or one
// block, per image.
//
// The affinity is a bit matrix (computed by triton/normalized_cut.py), and a product with it sums entries of a vector.
// Consumer GPUs add 64-bit numbers slowly, but all GPUs add bytes fast on their tensor cores. The vector is therefore
// converted to 64-bit integers, and these to eight signed digits in base 256: a matrix [n, 8] of bytes. Its product
// with the bits, expanded to bytes, is exact, and the digit sums are converted back to 64-bit integers. Rounding to
// integers has an error of 2^-50 of the largest entry at 3,600 tokens.
#include <algorithm>
#include <climits>
#include <cmath>

#include "lanczos.h"
#include "mma.h"
#include "namedmask/normalized_cut.h"
#include "team.h"

namespace namedmask::cuda {
namespace {

// 64 images in clusters of four occupy two blocks of each of an H100 SXM's multiprocessors.
using Cluster = Team<4, 8>;
using Block = Team<1, 16>;
constexpr int64_t kAtOnce = 4;     // groups of columns whose loads do not wait for each other
constexpr int kTile = 128;         // rows are padded to a multiple of this; a group of columns is four words
constexpr int kMaxImages = 100;    // per launch: the table below must fit the 4 kB of a kernel's arguments
constexpr double kTie = 1 - 1e-5;  // entries this close to the largest count as equal
constexpr uint64_t kSigns = 0x8080808080808080ull;

struct Images {
  int32_t first = 0;  // of the batch
  int32_t begin[kMaxImages] = {}, length[kMaxImages] = {};
  int64_t bits[kMaxImages] = {}, work[kMaxImages] = {};  // the first element of the image's part
};

__host__ __device__ int64_t padded_rows(int64_t n) { return (n + kTile - 1) / kTile * kTile; }
__host__ __device__ int64_t max_steps(int64_t n, int64_t iterations) {
  const int64_t most = n > 1 ? n - 1 : 0;
  return iterations < most ? iterations : most;
}
__host__ __device__ int64_t work_size(int64_t n, int64_t steps) {
  return (steps + 4) * padded_rows(n) + Lanczos<Block>::small_size(steps) + Block::memory_size(steps + 2);
}

struct alignas(8) Pair32 {
  uint32_t digits[2];
};

// The arrays of an image in device memory. A thread accesses only its own entries of vectors (see lanczos.h).
template <class Team>
struct Cut {
  Team& team;
  int64_t n, padded, steps;
  const uint32_t* bits;  // [padded / kTile, padded, 4]: group of columns, row, word
  double* known;         // D^1/2 1, the first eigenvector, then the Lanczos basis; vectors are `padded` elements apart

  __device__ double* product() const { return known + (steps + 1) * padded; }
  __device__ double* inverse_root() const { return product() + padded; }
  __device__ uint32_t* digits() const {  // [padded / kTile, 4, 32, 2]: the operands of four matrix products
    return reinterpret_cast<uint32_t*>(product() + 2 * padded);
  }
  __device__ Lanczos<Team> lanczos() const {
    return {team,      static_cast<int32_t>(n), 1, static_cast<int32_t>(steps), padded, known,
            product(), product() + 3 * padded};
  }
};

// product = D^-1/2 A D^-1/2 q
template <class Team>
__device__ void multiply(const Cut<Team>& cut, const double* q, double eps) {
  constexpr int kThreads = Team::kThreads;
  const int64_t thread = Team::thread();
  double total = 0, largest = 0;
  for (int64_t i = thread; i < cut.n; i += kThreads) {
    const double x = cut.inverse_root()[i] * q[i];
    total += x;
    largest = max(largest, fabs(x));
    cut.product()[i] = x;
  }
  double* const parts = cut.team.next_parts();
  Team::put(parts, 0, total, Sum());
  Team::put(parts, 1, largest, Most());
  Team::sync();
  total = Team::get(parts, 0, Sum());
  largest = Team::get(parts, 1, Most());
  int exponent, count;  // the largest entry is below 2^exponent and n below 2^count: a sum of n integers is below 2^62
  frexp(largest, &exponent);
  frexp(static_cast<double>(cut.n), &count);
  const double unit = ldexp(1.0, exponent + count - 62), scale = ldexp(1.0, 62 - exponent - count);

  // Bits of a word at a distance of 8 become the bytes of a register, so a register of digits holds columns 8 apart.
  for (int64_t four = thread; four < cut.padded / 4; four += kThreads) {
    const int64_t group = four / 32, step = four / 8 % 4, word = four / 2 % 4, half = four % 2;
    uint32_t digit[8] = {};
    for (int i = 0; i < 4; ++i) {
      const int64_t j = group * kTile + word * 32 + 8 * i + 2 * step + half;
      const int64_t integer = j < cut.n ? llrint(cut.product()[j] * scale) : 0;
      const uint64_t bytes = (static_cast<uint64_t>(integer) + kSigns) ^ kSigns;
      for (int d = 0; d < 8; ++d) digit[d] |= static_cast<uint32_t>(bytes >> 8 * d & 255) << 8 * i;
    }
    for (int d = 0; d < 8; ++d) cut.digits()[group * 256 + step * 64 + (d * 4 + word) * 2 + half] = digit[d];
  }
  Team::sync();

  const int64_t lane = thread % 32, word = lane % 4;
  for (int64_t row = thread / 32 * 32; row < cut.padded; row += kThreads) {  // 32 rows per warp, those of its threads
    int32_t sums[2][4] = {};
    const uint32_t* bits = cut.bits + row * 4 + lane;
    const Pair32* digits = reinterpret_cast<const Pair32*>(cut.digits()) + lane;
    for (int64_t group = 0; group < cut.padded / kTile; group += kAtOnce) {
      const int64_t last = cut.padded / kTile - 1;
      uint32_t w[kAtOnce][4];  // of rows 8 apart; 0 after the last group
#pragma unroll
      for (int64_t g = 0; g < kAtOnce; ++g) {
        const uint32_t* from = bits + min(group + g, last) * 4 * cut.padded;
        for (int i = 0; i < 4; ++i) w[g][i] = group + g <= last ? from[32 * i] : 0;
      }
#pragma unroll
      for (int64_t g = 0; g < kAtOnce; ++g) {
        const Pair32* from = digits + min(group + g, last) * 128;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const Pair32 b = from[32 * step];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const uint32_t low = w[g][2 * r] >> 2 * step, high = w[g][2 * r + 1] >> 2 * step, ones = 0x01010101;
            const uint32_t a[4] = {low & ones, high & ones, low >> 1 & ones, high >> 1 & ones};
            multiply_add_bytes(sums[r], a, b.digits);
          }
        }
      }
    }
    uint64_t mine = 0;
#pragma unroll
    for (int64_t r = 0; r < 4; ++r) {
      const auto low = static_cast<uint64_t>(static_cast<int64_t>(sums[r / 2][r % 2 * 2]));
      const auto high = static_cast<uint64_t>(static_cast<int64_t>(sums[r / 2][r % 2 * 2 + 1]));
      uint64_t sum = (low + (high << 8)) << 16 * word;
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (word == r) mine = sum;
    }
    // The lane has the sum of row 8 * word + lane / 4; its own is that of its number.
    mine = __shfl_sync(kAllLanes, mine, static_cast<int>(lane % 8 * 4 + lane / 8));
    const int64_t i = row + lane;
    if (i < cut.n) {
      const double sum = static_cast<double>(static_cast<int64_t>(mine)) * unit;
      cut.product()[i] = cut.inverse_root()[i] * (eps * total + (1 - eps) * sum);
    }
  }
}

// Whether all tokens are alike, so that the image has no cut; `value` is then the common eigenvalue.
template <class Team>
__device__ bool alike(const Cut<Team>& cut, double eps, double* value) {
  double least = INFINITY, most = -1;  // of twice the number of bits in a row plus the bit on the diagonal
  for (int64_t i = Team::thread(); i < cut.n; i += Team::kThreads) {
    int32_t count = 0;
#pragma unroll 4
    for (int64_t group = 0; group < cut.padded / kTile; ++group) {
      const uint32_t* bits = cut.bits + (group * cut.padded + i) * 4;
      for (int word = 0; word < 4; ++word) count += __popc(bits[word]);
    }
    const uint32_t own = cut.bits[(i / kTile * cut.padded + i) * 4 + i % kTile / 32] >> i % 32 & 1;
    const double both = 2 * count + static_cast<int32_t>(own);
    least = min(least, both);
    most = max(most, both);
    cut.known[i] = sqrt(eps * static_cast<double>(cut.n) + (1 - eps) * count);
  }
  double* const parts = cut.team.next_parts();
  Team::put(parts, 0, least, Least());
  Team::put(parts, 1, most, Most());
  Team::sync();
  least = Team::get(parts, 0, Least());
  most = Team::get(parts, 1, Most());
  *value = 1;
  if (cut.n < 2) return true;
  const int64_t own = static_cast<int64_t>(most) % 2, others = static_cast<int64_t>(most) / 2 - own;
  if (least != most || (others != 0 && others != cut.n - 1)) return false;
  // A = (self - other) I + other 11' and D = degree I
  const double self = own ? 1 : eps, other = others ? 1 : eps;
  *value = 1 - (self - other) / (self + static_cast<double>(cut.n - 1) * other);
  return true;
}

struct Results {
  float* vector;
  double *value, *residual;
  int32_t *iterations, *seed;
  uint8_t* partition;
};

template <class Team>
__global__ void __launch_bounds__(Team::kBlockThreads, Team::kBlockThreads <= 256 ? 2 : 1)
    cut_images(const __grid_constant__ Images images, const uint32_t* all_bits, double* work,
               const __grid_constant__ Results results, double eps, double tolerance, int64_t iterations) {
  constexpr int kThreads = Team::kThreads;
  const int32_t b = Team::number();
  const int64_t thread = Team::thread(), n = images.length[b], steps = max_steps(n, iterations);
  double* const memory = work + images.work[b];
  Team team(memory, steps + 2);
  const Cut<Team> cut = {
      team, n, padded_rows(n), steps, all_bits + images.bits[b], memory + Team::memory_size(steps + 2)};
  float* vector = results.vector + images.begin[b];
  uint8_t* partition = results.partition + images.begin[b];
  const auto report = [&](double value, double residual, int64_t products, int32_t seed) {
    if (thread != 0) return;
    const int32_t image = images.first + b;
    results.value[image] = value;
    results.residual[image] = residual;
    results.iterations[image] = static_cast<int32_t>(products);
    results.seed[image] = seed;
  };

  double common;
  if (alike(cut, eps, &common)) {
    for (int64_t i = thread; i < n; i += kThreads) vector[i] = 0, partition[i] = 0;
    report(common, 0, 0, -1);
    return;
  }
  double squares = 0;
  for (int64_t i = thread; i < n; i += kThreads) {
    cut.inverse_root()[i] = 1 / cut.known[i];
    squares += cut.known[i] * cut.known[i];
  }
  const double norm = sqrt(team.reduce(squares, Sum()));
  for (int64_t i = thread; i < n; i += kThreads) cut.known[i] /= norm;
  const Lanczos<Team> lanczos = cut.lanczos();
  const Pair pair = lanczos.solve(0, tolerance, [&](const double* q) { multiply(cut, q, eps); });
  lanczos.vector(pair.products, cut.product());

  double largest = 0, sum = 0;
  for (int64_t i = thread; i < n; i += kThreads) {
    const double v = cut.product()[i] *= cut.inverse_root()[i];
    largest = max(largest, fabs(v));
    sum += v;
  }
  largest = team.reduce(largest, Most());
  const double mean = team.reduce(sum, Sum()) / static_cast<double>(n);
  auto first = static_cast<double>(n);
  for (int64_t i = thread; i < n; i += kThreads) {
    if (fabs(cut.product()[i]) >= kTie * largest) first = min(first, static_cast<double>(i));
  }
  const auto seed = static_cast<int32_t>(team.reduce(first, Least()));
  const double sign = cut.product()[seed] < 0 ? -1 : 1;
  for (int64_t i = thread; i < n; i += kThreads) {
    const double v = sign * cut.product()[i];
    vector[i] = static_cast<float>(v);
    partition[i] = v > sign * mean;
  }
  report(1 - pair.value, pair.residual, pair.products, seed);
}

}  // namespace

void normalized_cut(const TensorView& bits, const TensorView& offsets, const TensorView& shapes,
                    const TensorView& vector, const TensorView& value, const TensorView& residual,
                    const TensorView& iterations, const TensorView& partition, const TensorView& seed,
                    const TensorView& workspace, double eps, double tolerance, int64_t max_iterations, Stream stream) {
  const char* op = "normalized_cut";
  expect(op, "vector", vector, DType::kFloat32, {-1}, Device::kCUDA);
  const RaggedShape batch = expect_ragged(op, offsets, shapes, vector.shape[0]);
  expect(op, "value", value, DType::kFloat64, {batch.count}, Device::kCUDA);
  expect(op, "residual", residual, DType::kFloat64, {batch.count}, Device::kCUDA);
  expect(op, "iterations", iterations, DType::kInt32, {batch.count}, Device::kCUDA);
  expect(op, "partition", partition, DType::kBool, {vector.shape[0]}, Device::kCUDA);
  expect(op, "seed", seed, DType::kInt32, {batch.count}, Device::kCUDA);
  int64_t words = 0, doubles = 0;
  for (int64_t b = 0; b < batch.count; ++b) {
    const int64_t n = batch.end(b) - batch.begin(b);
    words += padded_rows(n) * padded_rows(n) / 32;
    doubles += work_size(n, max_steps(n, max_iterations));
  }
  expect(op, "bits", bits, DType::kInt32, {words}, Device::kCUDA);
  expect(op, "workspace", workspace, DType::kFloat64, {doubles}, Device::kCUDA);
  const OnDevice device(vector);
  const bool in_clusters = has_clusters(cut_images<Cluster>);
  const Results results = {vector.as<float>(),       value.as<double>(), residual.as<double>(),
                           iterations.as<int32_t>(), seed.as<int32_t>(), partition.as<uint8_t>()};
  words = doubles = 0;
  for (int64_t first = 0; first < batch.count; first += kMaxImages) {
    Images images;
    images.first = static_cast<int32_t>(first);
    const int64_t count = std::min<int64_t>(kMaxImages, batch.count - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = batch.end(first + i) - batch.begin(first + i);
      images.begin[i] = static_cast<int32_t>(batch.begin(first + i));
      images.length[i] = static_cast<int32_t>(n);
      images.bits[i] = words, images.work[i] = doubles;
      words += padded_rows(n) * padded_rows(n) / 32;
      doubles += work_size(n, max_steps(n, max_iterations));
    }
    if (in_clusters) {
      launch_clusters(cut_images<Cluster>, count, Cluster::kBlocks, Cluster::kBlockThreads, stream, images,
                      bits.as<uint32_t>(), workspace.as<double>(), results, eps, tolerance, max_iterations);
    } else {
      launch(cut_images<Block>, count, Block::kBlockThreads, stream, images, bits.as<uint32_t>(),
             workspace.as<double>(), results, eps, tolerance, max_iterations);
    }
  }
}

}  // namespace namedmask::cuda
