// SPDX-License-Identifier: MIT
// The affinity has two values, so it is stored as a bit matrix. A product with it sums the entries whose bit is set:
// tables hold all possible sums of a few columns, and a row adds the entries that its bits select.
// The first eigenvector of M = D^-1/2 A D^-1/2 is known (D^1/2 1, eigenvalue 1), so Lanczos runs on its complement and
// the largest Ritz value is 1 - value.
#include "namedmask/normalized_cut.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cosines.h"
#include "for_each_image.h"
#include "lanczos.h"
#include "level.h"
#include "normalized_cut_levels.h"
#include "parallel_for.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "normalized_cut";
constexpr int64_t kBlockWords = kBlock / kWord;
constexpr int64_t kPanelsAtOnce = 8;
constexpr int64_t kRowsOfPart = 1024;  // of a product with the affinity; each part makes tables of its own
constexpr double kTie = 1 - 1e-5;      // entries this close to the largest count as equal
// An image with fewer products runs on one thread: with 2.4e8 (784 tokens) a second thread saves 0.7 of 1.9 ms, but
// costs 4 to 8 ms, one or two time slices, whenever another process keeps its core busy.
constexpr double kWorthThreads = 4e8;
static_assert(kBlock % kWord == 0 && kBlock % kMicroRows == 0);

const CutKernels& kernels() { return NMK_BEST(normalized_cut); }

// Transposes the 32 x 32 bit matrix a, one word per row: squares of j x j bits change places. 64 bits hold two rows.
void transpose(const uint32_t* a, uint32_t* out) {
  uint64_t x[16];
  for (int k = 0; k < 16; ++k) x[k] = a[2 * k] | uint64_t{a[2 * k + 1]} << kWord;
  uint64_t mask = 0x0000ffff0000ffff;
  for (int j = 16; j > 1; j >>= 1, mask ^= mask << j) {
    for (int pair = 0; pair < 8; ++pair) {
      const int k = (pair & ~(j / 2 - 1)) * 2 | (pair & (j / 2 - 1));
      const uint64_t t = ((x[k] >> j) ^ x[k | j / 2]) & mask;
      x[k | j / 2] ^= t;
      x[k] ^= t << j;
    }
  }
  for (int k = 0; k < 16; ++k) {
    const uint64_t t = ((x[k] >> 31) ^ x[k]) & 0xaaaaaaaa;
    const uint64_t rows = x[k] ^ t ^ (t << 31);
    out[2 * k] = static_cast<uint32_t>(rows), out[2 * k + 1] = static_cast<uint32_t>(rows >> kWord);
  }
}

struct Tile {
  int64_t block, begin, end;  // rows of the block, words [begin, end)
};

class Cut {
 public:
  struct Result {
    float* vector;
    double *value, *residual;
    int32_t *iterations, *seed;
    uint8_t *partition, *foreground;
  };

  // features [h * w, C]. False if they are not finite. May run in a parallel region, whose threads then share the work
  // on the affinity and, if the image is `shared`, on products with it.
  bool run(const float* features, int64_t h, int64_t w, int64_t channels, const CutSettings& settings, bool shared,
           const Result& result) {
    settings_ = settings, shared_ = shared;
    prepare(features, h, w, channels, result);
    parallel_for(cosines_.panels(), kPanelsAtOnce, [&](int64_t panel) { cosines_.normalize(panel); });
    if (!cosines_.finite()) return false;
    const double reach = cosines_.reach();
    parallel_for(static_cast<int64_t>(tiles_.size()), 1, [&](int64_t i) { connect(tiles_[i], reach); });
    solve();
    return true;
  }

  size_t bytes() const { return cosines_.bytes() + bit_memory_.bytes() + vector_memory_.bytes() + lanczos_.bytes(); }

 private:
  void prepare(const float* features, int64_t h, int64_t w, int64_t channels, const Result& result) {
    width_ = w, n_ = h * w, result_ = result;
    words_ = (n_ + kWord - 1) / kWord;
    // no cosine lies beyond such a tau: the products are exact only in floats
    const Products products = std::abs(settings_.tau) < 1 ? Products::kInt16 : Products::kFloat32;
    cosines_.prepare(features, n_, channels, products, settings_.tau);
    padded_ = cosines_.padded();
    bits_ = bit_memory_.reserve(words_ * padded_);
    double* memory = vector_memory_.reserve(3 * n_ + kWord);
    inverse_root_ = memory, product_ = memory + n_, input_ = memory + 2 * n_;
    std::fill_n(input_ + n_, kWord, 0.0);  // read where bits are 0
    counts_.resize(n_), queue_.resize(n_), diagonal_.resize(n_);
    tiles_.clear();
    for (int64_t block = 0; block < padded_ / kBlock; ++block) {
      for (int64_t word = block * kBlockWords; word < words_; word += kTileWords) {
        tiles_.push_back({block, word, std::min(words_, word + kTileWords)});
      }
    }
  }

  // On one thread, but for the products with the affinity.
  void solve() {
    count();
    if (alike()) {
      // A = (self - other) I + other 11' and D = degree I
      const double self = diagonal_[0] ? 1 : settings_.eps;
      const double other = counts_[0] > diagonal_[0] ? 1 : settings_.eps;
      finish_alike(n_ < 2 ? 1.0 : 1 - (self - other) / (self + static_cast<double>(n_ - 1) * other));
      return;
    }
    double* u = lanczos_.prepare(n_, 1, settings_.max_iterations);
    for (int64_t i = 0; i < n_; ++i) {
      u[i] = std::sqrt(settings_.eps * static_cast<double>(n_) + (1 - settings_.eps) * counts_[i]);
      inverse_root_[i] = 1 / u[i];
    }
    const double factor = 1 / std::sqrt(dot(u, u, n_));
    for (int64_t i = 0; i < n_; ++i) u[i] *= factor;
    lanczos_.solve(settings_.tolerance, [&](const double* q, int64_t, double* out) { multiply(q, out); });
    finish();
  }

  // Writes the bits of a tile on or above the diagonal and their mirror image. Bits are word-major, bits_[word][row],
  // the order in which products read them. Each word belongs to one tile.
  void connect(const Tile& tile, double reach) {
    const int64_t row = tile.block * kBlock;
    const int64_t count = round_up(std::min(kBlock, n_ - row), kMicroRows);
    cosines_.above(row, count, tile.begin * kWord, tile.end - tile.begin, settings_.tau, reach,
                   bits_ + tile.begin * padded_ + row, padded_);
    for (int64_t word = tile.begin; word < tile.end; ++word) {
      uint32_t* bits = bits_ + word * padded_ + row;
      if (const int64_t left = n_ - word * kWord; left < kWord) {  // padding repeats the last token
        for (int64_t r = 0; r < count; ++r) bits[r] &= (1u << left) - 1;
      }
      if (word < (tile.block + 1) * kBlockWords) continue;
      for (int64_t k = 0; k < kBlockWords; ++k) {
        transpose(bits + k * kWord, bits_ + (tile.block * kBlockWords + k) * padded_ + word * kWord);
      }
    }
  }

  // Counts the bits set in each row, and reads the diagonal.
  void count() {
    std::fill(counts_.begin(), counts_.end(), 0);
    for (int64_t word = 0; word < words_; ++word) {
      for (int64_t i = 0; i < n_; ++i) {
        uint32_t x = bits_[word * padded_ + i];  // not __builtin_popcount, a function call without -mpopcnt
        x -= x >> 1 & 0x55555555;
        x = (x & 0x33333333) + (x >> 2 & 0x33333333);
        x = (x + (x >> 4)) & 0x0f0f0f0f;
        counts_[i] += static_cast<int32_t>(x * 0x01010101 >> 24);
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      diagonal_[i] = bits_[i / kWord * padded_ + i] >> (i % kWord) & 1;
    }
  }

  // product_[i] = sum of input_[j] where bit (i, j) is set. The order of additions does not depend on the parts.
  void multiply() {
    const int64_t parts = shared_ ? std::min<int64_t>(omp_get_num_threads(), 1 + n_ / kRowsOfPart) : 1;
    parallel_for(parts, 1, [&](int64_t part) { multiply(n_ * part / parts, n_ * (part + 1) / parts); });
  }

  // The same for rows [begin, end).
  void multiply(int64_t begin, int64_t end) {
    std::fill(product_ + begin, product_ + end, 0.0);
    for (int64_t word = 0; word < words_; ++word) {
      kernels().add_selected(bits_ + word * padded_ + begin, end - begin, input_ + word * kWord, product_ + begin);
    }
  }

  // out = D^-1/2 A D^-1/2 q
  void multiply(const double* q, double* out) {
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) total += input_[i] = inverse_root_[i] * q[i];
    multiply();
    for (int64_t i = 0; i < n_; ++i) {
      out[i] = inverse_root_[i] * (settings_.eps * total + (1 - settings_.eps) * product_[i]);
    }
  }

  // Whether no token differs from another.
  bool alike() const {
    for (int64_t i = 1; i < n_; ++i) {
      if (counts_[i] != counts_[0] || diagonal_[i] != diagonal_[0]) return false;
    }
    if (n_ < 2) return true;
    const int64_t others = counts_[0] - diagonal_[0];
    return others == 0 || others == n_ - 1;
  }

  void finish_alike(double value) {
    std::fill_n(result_.vector, n_, 0.0f);
    std::fill_n(result_.partition, n_, 0);
    std::fill_n(result_.foreground, n_, 0);
    *result_.value = value;
    *result_.residual = 0;
    *result_.iterations = 0;
    *result_.seed = -1;
  }

  void finish() {
    double* v = product_;
    lanczos_.vector(0, v);
    double largest = 0, mean = 0;
    for (int64_t i = 0; i < n_; ++i) {
      v[i] *= inverse_root_[i];
      largest = std::max(largest, std::abs(v[i]));
    }
    int64_t seed = 0;
    while (std::abs(v[seed]) < kTie * largest) ++seed;
    const double sign = v[seed] < 0 ? -1 : 1;
    for (int64_t i = 0; i < n_; ++i) mean += v[i] *= sign;
    mean /= static_cast<double>(n_);
    for (int64_t i = 0; i < n_; ++i) {
      result_.vector[i] = static_cast<float>(v[i]);
      result_.partition[i] = v[i] > mean;
    }
    fill_component(static_cast<int32_t>(seed));
    *result_.value = 1 - lanczos_.value(0);
    *result_.residual = lanczos_.residual(0);
    *result_.iterations = static_cast<int32_t>(lanczos_.products());
    *result_.seed = static_cast<int32_t>(seed);
  }

  // foreground: the 4-connected component of the partition that contains the seed.
  void fill_component(int32_t seed) {
    uint8_t* out = result_.foreground;
    std::fill_n(out, n_, 0);
    int64_t size = 0;
    const auto visit = [&](int32_t i) {
      if (result_.partition[i] && !out[i]) out[i] = 1, queue_[size++] = i;
    };
    const auto w = static_cast<int32_t>(width_);
    visit(seed);
    while (size) {
      const int32_t i = queue_[--size];
      if (i >= w) visit(i - w);
      if (i + w < n_) visit(i + w);
      if (i % w) visit(i - 1);
      if (i % w != w - 1) visit(i + 1);
    }
  }

  CutSettings settings_;
  bool shared_ = false;
  Result result_ = {};
  int64_t width_ = 0, n_ = 0, padded_ = 0, words_ = 0;
  Cosines cosines_;
  Buffer<uint32_t> bit_memory_;
  Buffer<double> vector_memory_;
  uint32_t* bits_ = nullptr;
  double *inverse_root_ = nullptr, *input_ = nullptr, *product_ = nullptr;
  Lanczos lanczos_;
  std::vector<int32_t> counts_, queue_;
  std::vector<uint8_t> diagonal_;
  std::vector<Tile> tiles_;
};

}  // namespace

void normalized_cut(const TensorView& features, const TensorView& offsets, const TensorView& shapes,
                    const TensorView& vector, const TensorView& value, const TensorView& residual,
                    const TensorView& iterations, const TensorView& partition, const TensorView& seed,
                    const TensorView& foreground, const CutSettings& settings) {
  expect(kOp, "features", features, DType::kFloat32, {-1, -1});
  const int64_t total = features.shape[0], channels = features.shape[1];
  const RaggedShape batch = expect_ragged(kOp, offsets, shapes, total);
  expect(kOp, "vector", vector, DType::kFloat32, {total});
  expect(kOp, "value", value, DType::kFloat64, {batch.count});
  expect(kOp, "residual", residual, DType::kFloat64, {batch.count});
  expect(kOp, "iterations", iterations, DType::kInt32, {batch.count});
  expect(kOp, "partition", partition, DType::kBool, {total});
  expect(kOp, "seed", seed, DType::kInt32, {batch.count});
  expect(kOp, "foreground", foreground, DType::kBool, {total});
  if (!(settings.eps > 0 && settings.eps < 1 && settings.tolerance > 0 && settings.max_iterations > 0) ||
      !std::isfinite(settings.tau)) {
    throw std::invalid_argument(std::string(kOp) + ": tau must be finite, eps between 0 and 1, tolerance and " +
                                "max_iterations positive");
  }
  // Images without tokens.
  std::fill_n(value.as<double>(), batch.count, 1.0);
  std::fill_n(residual.as<double>(), batch.count, 0.0);
  std::fill_n(iterations.as<int32_t>(), batch.count, 0);
  std::fill_n(seed.as<int32_t>(), batch.count, -1);
  const auto n = static_cast<double>(total);
  const bool shared = batch.count == 1 && n * n * static_cast<double>(channels) > kWorthThreads;
  const auto run = [&](int64_t b, Cut& cut) {
    const int64_t at = batch.begin(b);
    return cut.run(
        features.as<float>() + at * channels, batch.height(b), batch.width(b), channels, settings, shared,
        {vector.as<float>() + at, value.as<double>() + b, residual.as<double>() + b, iterations.as<int32_t>() + b,
         seed.as<int32_t>() + b, partition.as<uint8_t>() + at, foreground.as<uint8_t>() + at});
  };
  for_each_finite_image<Cut>(kOp, "features", batch, run, shared);
}

}  // namespace namedmask::cpu
