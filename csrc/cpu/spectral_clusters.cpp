// SPDX-License-Identifier: MIT
// The affinity is a matrix of rank C and a constant, A = (F F' - m) / (M - m), so a product with it is two products
// with the features F and one sum. Only m and M need all pairs of tokens, a tile at a time.
#include "namedmask/spectral_clusters.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <vector>

#include "lanczos.h"
#include "level.h"
#include "spectral_clusters_levels.h"
#include "unit_rows.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "spectral_clusters";
constexpr int64_t kMaxCount = 64;
constexpr int64_t kMaxProducts = 96;  // for each vector
constexpr int64_t kRestarts = 10, kRounds = 100;
constexpr double kTolerance = 1e-6;
constexpr double kAlike = 1e-6;     // affinities that differ by less do not differ
constexpr double kIsolated = 1e-6;  // row sums below are 0

const ClusterKernels& kernels() {
#if defined(__x86_64__)
  if (level() >= Level::kAVX512) return cluster_avx512;
  if (level() == Level::kAVX2) return cluster_avx2;
#endif
  return cluster_portable;
}

uint64_t mix(uint64_t z) {  // splitmix64's
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// Uniform in [0, 1).
class Random {
 public:
  Random(int64_t seed, int64_t k, int64_t run)
      : state_(mix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(k * kRestarts + run)) {
    state_ = mix(state_ + 0x9e3779b97f4a7c15ull);
  }
  double next() { return static_cast<double>(mix(state_ += 0x9e3779b97f4a7c15ull) >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

class KMeans {
 public:
  // points [dims, n]; labels of n tokens, `stride` elements from token to token.
  void run(const ClusterKernels& kernels, const double* points, int64_t n, int64_t dims, int64_t k, int64_t seed,
           int32_t* labels, int64_t stride) {
    points_ = points, n_ = n, dims_ = dims;
    distance_.resize(n), label_.resize(n), before_.resize(n), best_.resize(n);
    double least = INFINITY;
    for (int64_t run = 0; run < kRestarts; ++run) {
      Random random(seed, k, run);
      choose_centres(k, random);
      const double sum = refine(kernels);
      if (sum < least) least = sum, best_ = label_;
    }
    std::vector<int32_t> number(k, -1);
    int32_t next = 0;
    for (int64_t i = 0; i < n; ++i) {
      int32_t& mine = number[best_[i]];
      if (mine < 0) mine = next++;
      labels[i * stride] = mine;
    }
  }

 private:
  double squared_distance(int64_t i, const double* centre) const {
    double sum = 0;
    for (int64_t d = 0; d < dims_; ++d) {
      const double step = points_[d * n_ + i] - centre[d];
      sum += step * step;
    }
    return sum;
  }

  void add_centre(int64_t i) {
    for (int64_t d = 0; d < dims_; ++d) centres_.push_back(points_[d * n_ + i]);
    const double* centre = centres_.data() + centres_.size() - dims_;
    for (int64_t j = 0; j < n_; ++j) distance_[j] = std::min(distance_[j], squared_distance(j, centre));
  }

  // k-means++: each next centre is a token drawn with the square of its distance to those before.
  void choose_centres(int64_t k, Random& random) {
    centres_.clear();
    std::fill(distance_.begin(), distance_.end(), INFINITY);
    add_centre(std::min(n_ - 1, static_cast<int64_t>(random.next() * static_cast<double>(n_))));
    for (int64_t c = 1; c < k; ++c) {
      double total = 0, sum = 0;
      for (int64_t i = 0; i < n_; ++i) total += distance_[i];
      if (!(total > 0)) return;  // no point differs from the centres
      const double threshold = random.next() * total;
      int64_t chosen = 0;
      while (chosen + 1 < n_ && (sum += distance_[chosen]) <= threshold) ++chosen;
      add_centre(chosen);
    }
  }

  // Lloyd's rounds; returns the sum of squared distances to the nearest centres.
  double refine(const ClusterKernels& kernels) {
    const auto k = static_cast<int64_t>(centres_.size()) / dims_;
    for (int64_t round = 0;; ++round) {
      kernels.assign(points_, n_, dims_, centres_.data(), k, distance_.data(), label_.data());
      if (round == kRounds || (round && label_ == before_)) break;
      before_ = label_;
      sums_.assign(k * dims_, 0.0), sizes_.assign(k, 0);
      for (int64_t i = 0; i < n_; ++i) ++sizes_[label_[i]];
      for (int64_t d = 0; d < dims_; ++d) {
        for (int64_t i = 0; i < n_; ++i) sums_[label_[i] * dims_ + d] += points_[d * n_ + i];
      }
      for (int64_t c = 0; c < k; ++c) {
        for (int64_t d = 0; sizes_[c] && d < dims_; ++d) {
          centres_[c * dims_ + d] = sums_[c * dims_ + d] / static_cast<double>(sizes_[c]);
        }
      }
    }
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) sum += distance_[i];
    return sum;
  }

  const double* points_ = nullptr;
  int64_t n_ = 0, dims_ = 0;
  std::vector<double> centres_, distance_, sums_;
  std::vector<int64_t> label_, before_, best_, sizes_;
};

class Clusters {
 public:
  Clusters(const int32_t* counts, int64_t n_counts, int64_t seed, const ClusterKernels& kernels)
      : counts_(counts, counts + n_counts), seed_(seed), kernels_(kernels) {
    for (int32_t k : counts_) vectors_ = std::max<int64_t>(vectors_, k - 1);
  }

  // Everything that allocates, so that rows().normalise() and compare() may run in a parallel region.
  void prepare(const float* features, int64_t n, int64_t channels, int32_t* labels) {
    n_ = n, channels_ = channels, labels_ = labels;
    rows_.prepare(features, n, channels);
    ranges_.assign(2 * (rows_.padded() / kBlock), 0.0f);
    next_block_ = 0;
  }

  // The three steps, each to be called when the last is done; any number of threads may share the first two.

  UnitRows& rows() { return rows_; }

  // The range of G, a block of rows at a time, from the diagonal on.
  void compare() {
    for (int64_t block; (block = next_block_++) * kBlock < rows_.padded();) {
      float range[2] = {INFINITY, -INFINITY};
      for (int64_t column = block * kBlock; column < rows_.padded(); column += kWord) {
        kernels_.range(rows_.row(block * kBlock), kBlock, rows_.panel_of(column), channels_, range);
      }
      ranges_[2 * block] = range[0], ranges_[2 * block + 1] = range[1];
    }
  }

  // False if the features are not finite.
  bool solve() {
    if (!rows_.finite()) return false;
    const auto stride = static_cast<int64_t>(counts_.size());
    std::fill_n(labels_, n_ * stride, 0);
    if (n_ < 2 || vectors_ == 0) return true;
    double greatest = ranges_[1];
    least_ = ranges_[0];
    for (size_t i = 2; i < ranges_.size(); i += 2) {
      least_ = std::min<double>(least_, ranges_[i]);
      greatest = std::max<double>(greatest, ranges_[i + 1]);
    }
    if (!(greatest - least_ >= kAlike)) return true;
    scale_ = 1 / (greatest - least_);
    embed();
    for (int64_t c = 0; c < stride; ++c) {
      const int64_t dims = std::min<int64_t>(counts_[c] - 1, lanczos_.found());
      if (dims > 0) kmeans_.run(kernels_, points_.data(), n_, dims, counts_[c], seed_, labels_ + c, stride);
    }
    return true;
  }

 private:
  // points_ [found, n]: the eigenvectors v_2, v_3, ...
  void embed() {
    inverse_root_.assign(n_, 1.0);
    scaled_.resize(vectors_ * n_), sums_.resize(vectors_ * channels_);
    std::vector<double> degrees(n_);
    const std::vector<double> ones(n_, 1.0);
    affine(ones.data(), 1, degrees.data());
    double* u = lanczos_.prepare(n_, vectors_, kMaxProducts * vectors_);
    for (int64_t i = 0; i < n_; ++i) {
      u[i] = degrees[i] > kIsolated ? std::sqrt(degrees[i]) : 0;
      inverse_root_[i] = u[i] > 0 ? 1 / u[i] : 0;
    }
    const double norm = std::sqrt(dot(u, u, n_));
    for (int64_t i = 0; i < n_; ++i) u[i] /= norm;
    lanczos_.solve(kTolerance, [&](const double* q, int64_t count, double* out) { affine(q, count, out); });
    points_.resize(lanczos_.found() * n_);
    for (int64_t j = 0; j < lanczos_.found(); ++j) {
      double* v = points_.data() + j * n_;
      lanczos_.vector(j, v);
      for (int64_t i = 0; i < n_; ++i) v[i] *= inverse_root_[i];
    }
  }

  // out [count, n] = D^-1/2 A D^-1/2 times q [count, n]; with inverse_root_ still 1, A times q.
  void affine(const double* q, int64_t count, double* out) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t i = 0; i < n_; ++i) scaled_[c * n_ + i] = inverse_root_[i] * q[c * n_ + i];
    }
    kernels_.project(rows_.row(0), n_, channels_, scaled_.data(), count, sums_.data());
    kernels_.expand(rows_.row(0), n_, channels_, sums_.data(), count, out);
    for (int64_t c = 0; c < count; ++c) {
      double total = 0;
      for (int64_t i = 0; i < n_; ++i) total += scaled_[c * n_ + i];
      for (int64_t i = 0; i < n_; ++i) {
        out[c * n_ + i] = inverse_root_[i] * scale_ * (out[c * n_ + i] - least_ * total);
      }
    }
  }

  const std::vector<int32_t> counts_;
  const int64_t seed_;
  const ClusterKernels& kernels_;
  int64_t vectors_ = 0, n_ = 0, channels_ = 0;
  int32_t* labels_ = nullptr;
  UnitRows rows_;
  std::vector<float> ranges_;  // least and largest entry of each block of rows
  std::atomic<int64_t> next_block_{0};
  double least_ = 0, scale_ = 1;
  std::vector<double> inverse_root_, scaled_, sums_, points_;
  Lanczos lanczos_;
  KMeans kmeans_;
};

}  // namespace

void spectral_clusters(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& counts, const TensorView& labels, int64_t seed) {
  expect(kOp, "features", features, DType::kFloat32, {-1, -1});
  expect(kOp, "counts", counts, DType::kInt32, {-1});
  const int64_t total = features.shape[0], channels = features.shape[1], n_counts = counts.shape[0];
  const RaggedShape batch = expect_ragged(kOp, offsets, shapes, total);
  expect(kOp, "labels", labels, DType::kInt32, {total, n_counts});
  for (int64_t c = 0; c < n_counts; ++c) {
    const int32_t k = counts.as<int32_t>()[c];
    if (k < 1 || k > kMaxCount) {
      throw std::invalid_argument(std::string(kOp) + ": k must be between 1 and 64, but is " + std::to_string(k));
    }
  }
  const ClusterKernels& chosen = kernels();
  const auto prepare = [&](Clusters& clusters, int64_t b) {
    const int64_t at = batch.begin(b);
    clusters.prepare(features.as<float>() + at * channels, batch.end(b) - at, channels,
                     labels.as<int32_t>() + at * n_counts);
  };
  std::vector<uint8_t> refused(batch.count, 0);
  std::exception_ptr failure;
  if (batch.count == 1) {
    Clusters clusters(counts.as<int32_t>(), n_counts, seed, chosen);
    prepare(clusters, 0);
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < clusters.rows().panels(); ++i) clusters.rows().normalise(i);
      clusters.compare();
    }
    refused[0] = !clusters.solve();
  } else {
#pragma omp parallel
    {
      Clusters clusters(counts.as<int32_t>(), n_counts, seed, chosen);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < batch.count; ++b) {
        try {
          prepare(clusters, b);
          for (int64_t i = 0; i < clusters.rows().panels(); ++i) clusters.rows().normalise(i);
          clusters.compare();
          refused[b] = !clusters.solve();
        } catch (...) {  // an exception must not leave a parallel region
#pragma omp critical(nmk_spectral_clusters)
          failure = std::current_exception();
        }
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
  const auto first = std::find(refused.begin(), refused.end(), 1);
  if (first != refused.end()) {
    throw std::invalid_argument(std::string(kOp) + ": features must be finite, but those of photo " +
                                std::to_string(first - refused.begin()) + " hold NaN or Inf");
  }
}

}  // namespace namedmask::cpu
