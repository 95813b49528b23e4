// SPDX-License-Identifier: MIT
// The affinity is a matrix of rank C plus a constant, A = (F F' - m) / (M - m), so a product with it takes two products
// with the features F and one sum. Only m requires all pairs of tokens, one tile at a time.
#include "namedmask/spectral_clusters.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cosines.h"
#include "for_each_image.h"
#include "lanczos.h"
#include "level.h"
#include "parallel_for.h"
#include "spectral_clusters_levels.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "spectral_clusters";
constexpr int64_t kMaxCount = 64;
constexpr int64_t kMaxProducts = 96;  // per vector
constexpr int64_t kRestarts = 10, kRounds = 100;
constexpr int64_t kPanelsAtOnce = 8, kPart = kBlock;  // units of work that threads share
constexpr double kTolerance = 1e-6;
constexpr double kAlike = 1e-6;     // affinities that differ by less count as equal
constexpr double kIsolated = 1e-6;  // smaller row sums count as 0
constexpr double kMuchAlike = 64;   // from this 1 / (M - m) on, factors of 29 bits are not enough

const ClusterKernels& kernels() { return NMK_BEST(spectral_clusters); }

// Rounds x to 29 bits (T. J. Dekker, Numer. Math. 18, 1971). A double represents its product with any float exactly, so
// that all instruction levels add the same numbers.
double narrow(double x) {
  const double far = x * (0x1p24 + 1);
  return far - (far - x);
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

// One run of k-means on points [dims, n].
class KMeans {
 public:
  // Does all allocation, so that threads may share run().
  void prepare(const double* points, int64_t n, int64_t dims, int64_t k) {
    points_ = points, n_ = n, dims_ = dims, k_ = k;
    distance_ = memory_.reserve(2 * n + 2 * k * dims), step_ = distance_ + n;
    centers_ = step_ + n, sums_ = centers_ + k * dims;
    label_ = integers_.reserve(2 * n + k), before_ = label_ + n, sizes_ = before_ + n;
  }

  void run(const ClusterKernels& kernels, Random random) {
    choose_centers(kernels, random);
    refine(kernels);
  }

  double spread() const { return spread_; }  // sum of squared distances to the nearest centers
  int64_t label(int64_t i) const { return label_[i]; }

 private:
  void add_center(const ClusterKernels& kernels, int64_t i) {
    double* center = centers_ + found_ * dims_;
    for (int64_t d = 0; d < dims_; ++d) center[d] = points_[d * n_ + i];
    kernels.assign(points_, n_, dims_, center, 1, found_ ? step_ : distance_, label_);
    for (int64_t j = 0; found_ && j < n_; ++j) distance_[j] = std::min(distance_[j], step_[j]);
    ++found_;
  }

  // k-means++: each next center is a token drawn with probability proportional to the squared distance to the others.
  void choose_centers(const ClusterKernels& kernels, Random& random) {
    found_ = 0;
    add_center(kernels, std::min(n_ - 1, static_cast<int64_t>(random.next() * static_cast<double>(n_))));
    while (found_ < k_) {
      double total = 0, sum = 0;
      for (int64_t i = 0; i < n_; ++i) total += distance_[i];
      if (!(total > 0)) return;  // all points are centers
      const double threshold = random.next() * total;
      int64_t chosen = 0;
      while (chosen + 1 < n_ && (sum += distance_[chosen]) <= threshold) ++chosen;
      add_center(kernels, chosen);
    }
  }

  // Lloyd's algorithm.
  void refine(const ClusterKernels& kernels) {
    for (int64_t round = 0;; ++round) {
      kernels.assign(points_, n_, dims_, centers_, found_, distance_, label_);
      if (round == kRounds || (round && std::equal(label_, label_ + n_, before_))) break;
      std::copy_n(label_, n_, before_);
      kernels.add_up(points_, n_, dims_, label_, found_, sums_, sizes_);
      for (int64_t c = 0; c < found_; ++c) {
        for (int64_t d = 0; sizes_[c] && d < dims_; ++d) {
          centers_[c * dims_ + d] = sums_[c * dims_ + d] / static_cast<double>(sizes_[c]);
        }
      }
    }
    spread_ = 0;
    for (int64_t i = 0; i < n_; ++i) spread_ += distance_[i];
  }

  const double* points_ = nullptr;
  int64_t n_ = 0, dims_ = 0, k_ = 0, found_ = 0;  // found_: number of centers
  Buffer<double> memory_;
  double *distance_ = nullptr, *step_ = nullptr, *centers_ = nullptr, *sums_ = nullptr;
  Buffer<int64_t> integers_;
  int64_t *label_ = nullptr, *before_ = nullptr, *sizes_ = nullptr;
  double spread_ = 0;
};

class Clusters {
 public:
  // labels [n, counts]. Returns false if the features are not finite.
  bool solve(const float* features, int64_t n, int64_t channels, const std::vector<int32_t>& counts, int64_t seed,
             int32_t* labels) {
    n_ = n, channels_ = channels;
    vectors_ = *std::max_element(counts.begin(), counts.end()) - 1;
    std::fill_n(labels, n * counts.size(), 0);
    cosines_.prepare(features, n, channels, Products::kInt8);
    squares_.resize(cosines_.padded());
    parallel_for(cosines_.panels(), kPanelsAtOnce, [&](int64_t panel) {
      cosines_.normalize(panel);
      for (int64_t i = panel * kPanel; i < (panel + 1) * kPanel; ++i) squares_[i] = cosine(i, i);
    });
    if (!cosines_.finite()) return false;
    if (n < 2 || vectors_ == 0) return true;
    find_range();
    if (!(greatest_ - least_ >= kAlike)) return true;
    embed();
    if (lanczos_.found() == 0) return true;
    cluster(counts, seed, labels);
    return true;
  }

  size_t bytes() const { return cosines_.bytes(); }  // everything else is small

 private:
  double cosine(int64_t i, int64_t j) const { return kernels_.cosine(cosines_.row(i), cosines_.row(j), channels_); }

  // Finds the smallest and the largest cosine. The largest is that of a token with itself (Cauchy-Schwarz). The
  // smallest requires all pairs, but only the few that may be below the smallest so far are computed exactly.
  void find_range() {
    greatest_ = *std::max_element(squares_.begin(), squares_.end());
    double least = INFINITY;
    least_of_part_.resize((n_ + kPart - 1) / kPart);
    for (int64_t round = 0, far = 0; round < 2;
         ++round) {  // initial bound: the token farthest from the token farthest from token 0
      parallel_for(least_of_part_.size(), 1, [&](int64_t part) {
        auto& [lowest, who] = least_of_part_[part] = {INFINITY, 0};
        for (int64_t i = part * kPart; i < std::min(n_, (part + 1) * kPart); ++i) {
          if (const double c = cosine(far, i); c < lowest) lowest = c, who = i;
        }
      });
      std::tie(least, far) = *std::min_element(least_of_part_.begin(), least_of_part_.end());
    }
    least_ = least;
    const double reach = cosines_.reach();
    parallel_for(cosines_.padded() / kBlock, 1, [&](int64_t block) {
      for (int64_t column = block * kBlock; column < cosines_.padded(); column += kWord) {
        const int64_t end = std::min(n_, std::min((block + 1) * kBlock, column + kWord));
        for (int64_t row = block * kBlock; row < end; row += kMicroRows) check_pairs(row, column, reach);
      }
    });
  }

  void check_pairs(int64_t row, int64_t column, double reach) {
    uint32_t bits[kMicroRows];
    cosines_.maybe_below(row, kMicroRows, column, least_, reach, bits);
    for (int64_t r = 0; r < kMicroRows; ++r) {
      for (uint32_t left = bits[r]; left; left &= left - 1) {
        const double c = cosine(row + r, column + __builtin_ctz(left));
        for (double least = least_; c < least && !least_.compare_exchange_weak(least, c);) continue;
      }
    }
  }

  // Computes points_ [found, n], the eigenvectors v_2, v_3, ...
  void embed() {
    scale_ = 1 / (greatest_ - least_);
    inverse_root_.assign(n_, 1.0);
    scaled_.resize(vectors_ * n_), sums_.resize(vectors_ * channels_);
    if (scale_ > kMuchAlike) remainders_.resize(sums_.size()), remainder_out_.resize(scaled_.size());
    parts_.resize((n_ + kPart - 1) / kPart * sums_.size());
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

  // out [count, n] = D^-1/2 A D^-1/2 times q [count, n]; while inverse_root_ is 1, A times q. Tokens are split into
  // parts whose sums are added in order, so that the bits do not depend on the threads. Factors of 29 bits have a
  // relative error of 2^-29, and A has 1 / (M - m) times that: if that is large, the remainders of the sums are
  // multiplied too.
  void affine(const double* q, int64_t count, double* out) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t i = 0; i < n_; ++i) scaled_[c * n_ + i] = narrow(inverse_root_[i] * q[c * n_ + i]);
    }
    const int64_t parts = (n_ + kPart - 1) / kPart, size = count * channels_;
    const auto tokens = [&](int64_t part) { return std::min(kPart, n_ - part * kPart); };
    parallel_for(parts, 1, [&](int64_t part) {
      kernels_.project(cosines_.row(part * kPart), tokens(part), channels_, scaled_.data() + part * kPart, count, n_,
                       parts_.data() + part * size);
    });
    std::copy_n(parts_.data(), size, sums_.data());
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) sums_[i] += parts_[part * size + i];
    }
    const bool with_remainders = scale_ > kMuchAlike;
    for (int64_t i = 0; i < size; ++i) {
      const double whole = sums_[i];
      sums_[i] = narrow(whole);
      if (with_remainders) remainders_[i] = whole - sums_[i];  // the remaining 24 bits
    }
    parallel_for(parts, 1, [&](int64_t part) {
      const float* rows = cosines_.row(part * kPart);
      double* to = out + part * kPart;
      kernels_.expand(rows, tokens(part), channels_, sums_.data(), count, to, n_);
      if (!with_remainders) return;
      double* rest = remainder_out_.data() + part * kPart;
      kernels_.expand(rows, tokens(part), channels_, remainders_.data(), count, rest, n_);
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t i = 0; i < tokens(part); ++i) to[c * n_ + i] += rest[c * n_ + i];
      }
    });
    for (int64_t c = 0; c < count; ++c) {
      double total = 0;
      for (int64_t i = 0; i < n_; ++i) total += scaled_[c * n_ + i];
      for (int64_t i = 0; i < n_; ++i) {
        out[c * n_ + i] = inverse_root_[i] * scale_ * (out[c * n_ + i] - least_ * total);
      }
    }
  }

  void cluster(const std::vector<int32_t>& counts, int64_t seed, int32_t* labels) {
    const auto n_counts = static_cast<int64_t>(counts.size());
    runs_.resize(n_counts * kRestarts);
    for (int64_t i = 0; i < n_counts * kRestarts; ++i) {
      const int64_t k = counts[i / kRestarts];
      if (k > 1) runs_[i].prepare(points_.data(), n_, std::min(k - 1, lanczos_.found()), k);
    }
    parallel_for(n_counts * kRestarts, 1, [&](int64_t i) {
      const int64_t k = counts[i / kRestarts];
      if (k > 1) runs_[i].run(kernels_, Random(seed, k, i % kRestarts));
    });
    for (int64_t c = 0; c < n_counts; ++c) {
      if (counts[c] == 1) continue;
      const auto first = runs_.begin() + c * kRestarts;
      const auto best = std::min_element(first, first + kRestarts,
                                         [](const KMeans& a, const KMeans& b) { return a.spread() < b.spread(); });
      std::vector<int32_t> number(counts[c], -1);
      int32_t next = 0;
      for (int64_t i = 0; i < n_; ++i) {
        int32_t& mine = number[best->label(i)];
        if (mine < 0) mine = next++;
        labels[i * n_counts + c] = mine;
      }
    }
  }

  const ClusterKernels& kernels_ = kernels();
  int64_t vectors_ = 0, n_ = 0, channels_ = 0;
  Cosines cosines_;
  std::vector<double> squares_;  // of the lengths of tokens
  std::vector<std::pair<double, int64_t>> least_of_part_;
  std::atomic<double> least_{0};
  double greatest_ = 0, scale_ = 1;
  std::vector<double> inverse_root_, scaled_, parts_, sums_, points_;
  std::vector<double> remainders_, remainder_out_;  // if tokens are very similar
  Lanczos lanczos_;
  std::vector<KMeans> runs_;  // kRestarts per count
};

}  // namespace

void spectral_clusters(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& counts, const TensorView& labels, int64_t seed) {
  expect(kOp, "features", features, DType::kFloat32, {-1, -1});
  expect(kOp, "counts", counts, DType::kInt32, {-1});
  const int64_t total = features.shape[0], channels = features.shape[1], n_counts = counts.shape[0];
  const RaggedShape batch = expect_ragged(kOp, offsets, shapes, total);
  expect(kOp, "labels", labels, DType::kInt32, {total, n_counts});
  const std::vector<int32_t> ks(counts.as<int32_t>(), counts.as<int32_t>() + n_counts);
  if (ks.empty()) return;
  for (const int32_t k : ks) {
    if (k < 1 || k > kMaxCount) {
      throw std::invalid_argument(std::string(kOp) + ": k must be between 1 and 64, but is " + std::to_string(k));
    }
  }
  const auto solve = [&](int64_t b, Clusters& clusters) {
    const int64_t at = batch.begin(b);
    return clusters.solve(features.as<float>() + at * channels, batch.end(b) - at, channels, ks, seed,
                          labels.as<int32_t>() + at * n_counts);
  };
  for_each_finite_image<Clusters>(kOp, "features", batch, solve, /*shared=*/true);
}

}  // namespace namedmask::cpu
