// SPDX-License-Identifier: MIT
// The affinity is two-valued, so it is a bit matrix, and a product with it needs sums of the entries whose bit is set:
// for every eight columns the 256 possible sums are tabulated, and a row adds one table entry per byte.
// The first eigenvector of M = D^-1/2 A D^-1/2 is known (D^1/2 1, eigenvalue 1), so Lanczos runs on its complement and
// its largest Ritz value is 1 - value.
#include "namedmask/normalized_cut.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <memory>
#include <vector>

#include "level.h"
#include "normalized_cut_levels.h"

namespace namedmask::cpu {
namespace {

constexpr const char* kOp = "normalized_cut";
constexpr int64_t kBlock = 96;  // rows of a tile: whole words and whole micro rows
constexpr int64_t kBlockWords = kBlock / kWord;
constexpr int64_t kTileWords = 8;  // words (columns / 32) of a tile
constexpr double kTie = 1 - 1e-5;  // entries this close to the largest are as large
static_assert(kBlock % kWord == 0 && kBlock % kMicroRows == 0);

const CutKernels& kernels() {
#if defined(__x86_64__)
  if (level() >= Level::kAVX512) return cut_avx512;
  if (level() == Level::kAVX2) return cut_avx2;
#endif
  return cut_portable;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that is not cleared: most of what is asked for is never touched when few iterations are needed.
template <class T>
class Buffer {
 public:
  T* get(int64_t n) {
    if (n > size_) data_.reset(new T[n]), size_ = n;
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

// Eight partial sums in a fixed order, which the compiler turns into vectors.
double dot(const double* a, const double* b, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

double sum_of_squares(const float* row, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += static_cast<double>(row[i + l]) * row[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += static_cast<double>(row[i]) * row[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

void axpy(double factor, const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

void scale(double factor, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// The 32 x 32 bit matrix a, a row a word, transposed.
void transpose(const uint32_t* a, uint32_t* out) {
  std::copy_n(a, 32, out);
  uint32_t mask = 0x0000ffff;
  for (int j = 16; j; j >>= 1, mask ^= mask << j) {
    for (int k = 0; k < 32; k = ((k | j) + 1) & ~j) {
      const uint32_t t = ((out[k] >> j) ^ out[k | j]) & mask;
      out[k | j] ^= t;
      out[k] ^= t << j;
    }
  }
}

// The largest eigenvalue of the symmetric tridiagonal matrix (diagonal, off) and its unit vector. `off` holds no zeros.
// down and up are scratch; all arrays but `off` are of n entries.
double largest_eigenpair(const double* diagonal, const double* off, int64_t n, double* s, double* down, double* up) {
  std::fill_n(s, n, 1.0);
  if (n == 1) return diagonal[0];
  constexpr double kTiny = 1e-300;
  const auto pivot = [](double d) { return std::abs(d) < kTiny ? kTiny : d; };
  double low = diagonal[0], high = diagonal[0];
  for (int64_t i = 0; i < n; ++i) {
    const double reach = (i ? std::abs(off[i - 1]) : 0) + (i + 1 < n ? std::abs(off[i]) : 0);
    low = std::max(low, diagonal[i]);  // the largest eigenvalue is at least every diagonal entry
    high = std::max(high, diagonal[i] + reach);
  }
  for (int step = 0; step < 200; ++step) {  // bisection: is every pivot of T - x negative?
    const double x = low + (high - low) / 2;
    if (x <= low || x >= high) break;
    double d = diagonal[0] - x;
    bool below = d < 0;
    for (int64_t i = 1; below && i < n; ++i) {
      d = diagonal[i] - x - off[i - 1] * off[i - 1] / pivot(d);
      below = d < 0;
    }
    (below ? high : low) = x;
  }
  const double theta = low + (high - low) / 2;
  // Twisted factorisation: eliminate from both ends and meet where what remains is smallest.
  down[0] = pivot(diagonal[0] - theta);
  for (int64_t i = 1; i < n; ++i) down[i] = pivot(diagonal[i] - theta - off[i - 1] * off[i - 1] / down[i - 1]);
  up[n - 1] = pivot(diagonal[n - 1] - theta);
  for (int64_t i = n - 2; i >= 0; --i) up[i] = pivot(diagonal[i] - theta - off[i] * off[i] / up[i + 1]);
  int64_t twist = 0;
  double least = INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const double gamma = std::abs(down[i] + up[i] - (diagonal[i] - theta));
    if (gamma < least) least = gamma, twist = i;
  }
  for (int64_t i = twist - 1; i >= 0; --i) s[i] = -off[i] * s[i + 1] / down[i];
  for (int64_t i = twist + 1; i < n; ++i) s[i] = -off[i - 1] * s[i - 1] / up[i];
  scale(1 / std::sqrt(dot(s, s, n)), s, n);
  return theta;
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

  Cut(const CutSettings& settings, const CutKernels& kernels) : settings_(settings), kernels_(kernels) {}

  // Everything that allocates, so that normalise() and connect() may run in a parallel region.
  void prepare(const float* features, int64_t h, int64_t w, int64_t channels, const Result& result) {
    features_ = features, width_ = w, n_ = h * w, channels_ = channels, result_ = result;
    padded_ = round_up(n_, kBlock);
    words_ = (n_ + kWord - 1) / kWord;
    steps_ = std::max<int64_t>(0, std::min(settings_.max_iterations, n_ - 1));
    rows_ = row_memory_.get(padded_ * channels_);
    panels_ = panel_memory_.get(padded_ * channels_);
    bits_ = bit_memory_.get((words_ + words_ % 2) * padded_);
    double* memory = vector_memory_.get((4 + steps_) * n_ + 2 * kWord);
    inverse_root_ = memory, product_ = memory + n_, basis_ = memory + 2 * n_, input_ = memory + (3 + steps_) * n_;
    std::fill_n(input_ + n_, 2 * kWord, 0.0);  // read where bits are 0
    alpha_.clear(), beta_.clear(), coefficients_.resize(steps_ + 2);
    alpha_.reserve(steps_), beta_.reserve(steps_), ritz_.resize(steps_), scratch_.resize(2 * steps_);
    counts_.resize(n_), queue_.resize(n_), diagonal_.resize(n_);
    tiles_.clear();
    for (int64_t block = 0; block < padded_ / kBlock; ++block) {
      for (int64_t word = block * kBlockWords; word < words_; word += kTileWords) {
        tiles_.push_back({block, word, std::min(words_, word + kTileWords)});
      }
    }
    next_tile_ = 0;
    finite_ = true;
    done_ = false;
  }

  // The three steps, each to be called when the last is done. Any number of threads may share the first two: each
  // normalises its part of the panels, and all call connect().

  int64_t panels() const { return padded_ / kPanel; }

  // Unit rows twice: row-major, and in panels of kPanel tokens side by side; rows beyond n are 0.
  void normalise(int64_t panel) {
    const int64_t first = panel * kPanel;
    for (int64_t i = first; i < first + kPanel; ++i) {
      float* out = rows_ + i * channels_;
      if (i >= n_) {
        std::fill_n(out, channels_, 0.0f);
        continue;
      }
      const float* in = features_ + i * channels_;
      const double squares = sum_of_squares(in, channels_);
      if (!(squares < INFINITY)) finite_ = false;
      const double factor = 1 / std::max(std::sqrt(squares), 1e-12);
      for (int64_t c = 0; c < channels_; ++c) out[c] = static_cast<float>(in[c] * factor);
    }
    float* out = panels_ + first * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < kPanel; ++i) out[c * kPanel + i] = rows_[(first + i) * channels_ + c];
    }
  }

  void connect() {
    for (size_t i; (i = next_tile_++) < tiles_.size();) connect(tiles_[i]);
  }

  // False if the features are not finite. One thread: it takes a tenth of the time, and a region's barriers cost more
  // than they bring on a machine that does something else too.
  bool solve() {
    if (!finite_) return false;
    if (words_ % 2) std::fill_n(bits_ + words_ * padded_, n_, 0u);
    count();
    start();
    while (!done_) {
      multiply();
      step();
    }
    return true;
  }

 private:
  // The bits of a tile on or above the diagonal, and their mirror image. Bits stand word-major, bits_[word][row], as
  // products read them. Each word is written by one tile.
  void connect(const Tile& tile) {
    const int64_t row = tile.block * kBlock;
    const int64_t count = round_up(std::min(kBlock, n_ - row), kMicroRows);
    const float threshold = settings_.tau >= 1 ? INFINITY : static_cast<float>(settings_.tau);
    for (int64_t word = tile.begin; word < tile.end; ++word) {
      uint32_t* bits = bits_ + word * padded_ + row;
      kernels_.connect(rows_ + row * channels_, count, panels_ + word * kWord * channels_, channels_, threshold, bits);
      if (const int64_t left = n_ - word * kWord; left < kWord) {  // padding is connected when tau is negative
        for (int64_t r = 0; r < count; ++r) bits[r] &= (1u << left) - 1;
      }
      if (word < (tile.block + 1) * kBlockWords) continue;
      for (int64_t k = 0; k < kBlockWords; ++k) {
        transpose(bits + k * kWord, bits_ + (tile.block * kBlockWords + k) * padded_ + word * kWord);
      }
    }
  }

  // Bits set in each row, and on the diagonal.
  void count() {
    std::fill_n(input_, n_, 1.0);
    multiply();
    for (int64_t i = 0; i < n_; ++i) {
      counts_[i] = static_cast<int32_t>(product_[i]);
      diagonal_[i] = bits_[i / kWord * padded_ + i] >> (i % kWord) & 1;
    }
  }

  // product_[i] = sum of input_[j] where bit (i, j) is set.
  void multiply() {
    double table[8][256];
    std::fill_n(product_, n_, 0.0);
    for (int64_t word = 0; word < words_; word += 2) {
      const double* x = input_ + word * kWord;
      for (int byte = 0; byte < 8; ++byte, x += 8) {
        table[byte][0] = 0;
        for (int bit = 0; bit < 8; ++bit) {
          for (int k = 0; k < 1 << bit; ++k) table[byte][k + (1 << bit)] = table[byte][k] + x[bit];
        }
      }
      const uint32_t* low = bits_ + word * padded_;
      const uint32_t* high = low + padded_;
      for (int64_t i = 0; i < n_; ++i) {
        const uint32_t a = low[i], b = high[i];
        product_[i] += ((table[0][a & 255] + table[1][a >> 8 & 255]) + (table[2][a >> 16 & 255] + table[3][a >> 24])) +
                       ((table[4][b & 255] + table[5][b >> 8 & 255]) + (table[6][b >> 16 & 255] + table[7][b >> 24]));
      }
    }
  }

  void start() {
    const double eps = settings_.eps;
    if (alike()) {
      // A = (self - other) I + other 11' and D = degree I
      const double self = n_ && diagonal_[0] ? 1 : eps;
      const double other = n_ && counts_[0] > diagonal_[0] ? 1 : eps;
      finish_alike(n_ < 2 ? 1.0 : 1 - (self - other) / (self + static_cast<double>(n_ - 1) * other));
      return;
    }
    uint64_t state = 0x9e3779b97f4a7c15ull;
    double* u = basis_;
    double* q = basis_ + n_;
    for (int64_t i = 0; i < n_; ++i) {
      const double degree = eps * static_cast<double>(n_) + (1 - eps) * counts_[i];
      u[i] = std::sqrt(degree);
      inverse_root_[i] = 1 / u[i];
      // splitmix64: a start without a pattern, so that no eigenvector is orthogonal to it
      uint64_t z = state += 0x9e3779b97f4a7c15ull;
      z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
      z = (z ^ z >> 27) * 0x94d049bb133111ebull;
      q[i] = static_cast<double>(static_cast<int64_t>(z ^ z >> 31)) * 0x1p-63;
    }
    scale(1 / std::sqrt(dot(u, u, n_)), u, n_);
    orthogonalise(q, 1);
    scale(1 / std::sqrt(dot(q, q, n_)), q, n_);
    feed(q);
  }

  // All tokens alike: nothing tells one from another.
  bool alike() const {
    for (int64_t i = 1; i < n_; ++i) {
      if (counts_[i] != counts_[0] || diagonal_[i] != diagonal_[0]) return false;
    }
    if (n_ < 2) return true;
    const int64_t others = counts_[0] - diagonal_[0];
    return others == 0 || others == n_ - 1;
  }

  // y minus its part in the span of the first `count` basis vectors; the second pass removes what rounding left.
  void orthogonalise(double* y, int64_t count) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = 0; j < count; ++j) coefficients_[j] = dot(basis_ + j * n_, y, n_);
      for (int64_t j = 0; j < count; ++j) axpy(-coefficients_[j], basis_ + j * n_, y, n_);
    }
  }

  // The next product is with D^-1/2 q.
  void feed(const double* q) {
    for (int64_t i = 0; i < n_; ++i) input_[i] = inverse_root_[i] * q[i];
    total_ = 0;
    for (int64_t i = 0; i < n_; ++i) total_ += input_[i];
  }

  void step() {
    const double eps = settings_.eps;
    const auto k = static_cast<int64_t>(alpha_.size());
    const double* q = basis_ + (k + 1) * n_;
    for (int64_t i = 0; i < n_; ++i) product_[i] = inverse_root_[i] * (eps * total_ + (1 - eps) * product_[i]);
    alpha_.push_back(dot(q, product_, n_));
    orthogonalise(product_, k + 2);
    const double beta = std::sqrt(dot(product_, product_, n_));
    const double theta =
        largest_eigenpair(alpha_.data(), beta_.data(), k + 1, ritz_.data(), scratch_.data(), scratch_.data() + steps_);
    const double residual = beta * std::abs(ritz_[k]);
    if (residual <= settings_.tolerance || k + 1 == steps_ || beta < 1e-14) {
      finish(1 - theta, residual);
      return;
    }
    beta_.push_back(beta);
    double* next = basis_ + (k + 2) * n_;
    for (int64_t i = 0; i < n_; ++i) next[i] = product_[i] / beta;
    feed(next);
  }

  void finish_alike(double value) {
    std::fill_n(result_.vector, n_, 0.0f);
    std::fill_n(result_.partition, n_, 0);
    std::fill_n(result_.foreground, n_, 0);
    *result_.value = value;
    *result_.residual = 0;
    *result_.iterations = 0;
    *result_.seed = -1;
    done_ = true;
  }

  void finish(double value, double residual) {
    double* v = product_;
    std::fill_n(v, n_, 0.0);
    for (size_t j = 0; j < alpha_.size(); ++j) axpy(ritz_[j], basis_ + (j + 1) * n_, v, n_);
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
    *result_.value = value;
    *result_.residual = residual;
    *result_.iterations = static_cast<int32_t>(alpha_.size());
    *result_.seed = static_cast<int32_t>(seed);
    done_ = true;
  }

  // foreground: what the seed reaches inside the partition.
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

  const CutSettings settings_;
  const CutKernels& kernels_;
  const float* features_ = nullptr;
  Result result_ = {};
  int64_t width_ = 0, n_ = 0, channels_ = 0, padded_ = 0, words_ = 0, steps_ = 0;
  Buffer<float> row_memory_, panel_memory_;
  Buffer<uint32_t> bit_memory_;
  Buffer<double> vector_memory_;
  float *rows_ = nullptr, *panels_ = nullptr;
  uint32_t* bits_ = nullptr;
  double *inverse_root_ = nullptr, *input_ = nullptr, *product_ = nullptr, *basis_ = nullptr;
  std::vector<double> alpha_, beta_, ritz_, scratch_, coefficients_;
  std::vector<int32_t> counts_, queue_;
  std::vector<uint8_t> diagonal_;
  std::vector<Tile> tiles_;
  std::atomic<size_t> next_tile_{0};
  std::atomic<bool> finite_{true};
  double total_ = 0;
  bool done_ = false;
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
  const auto prepare = [&](Cut& cut, int64_t b) {
    const int64_t at = batch.begin(b);
    cut.prepare(
        features.as<float>() + at * channels, batch.height(b), batch.width(b), channels,
        {vector.as<float>() + at, value.as<double>() + b, residual.as<double>() + b, iterations.as<int32_t>() + b,
         seed.as<int32_t>() + b, partition.as<uint8_t>() + at, foreground.as<uint8_t>() + at});
  };
  const CutKernels& chosen = kernels();
  std::vector<uint8_t> refused(batch.count, 0);
  std::exception_ptr failure;
  if (batch.count == 1) {
    Cut cut(settings, chosen);
    prepare(cut, 0);
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < cut.panels(); ++i) cut.normalise(i);
      cut.connect();
    }
    refused[0] = !cut.solve();
  } else {
#pragma omp parallel
    {
      Cut cut(settings, chosen);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < batch.count; ++b) {
        try {
          prepare(cut, b);
          for (int64_t i = 0; i < cut.panels(); ++i) cut.normalise(i);
          cut.connect();
          refused[b] = !cut.solve();
        } catch (...) {  // an exception must not leave a parallel region
#pragma omp critical(nmk_normalized_cut)
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
