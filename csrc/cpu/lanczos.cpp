// SPDX-License-Identifier: MIT
#include "lanczos.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lanczos_levels.h"
#include "level.h"

namespace namedmask::cpu {
namespace {

// If less remains of a unit vector's product, it is in the span of the basis (for products in float64). With less exact
// products a direction of rounding errors may enter the basis, which is harmless: it is orthogonal like any other.
constexpr double kExhausted = 1e-14;

// QR sweeps per eigenvalue, as in LAPACK; some three are needed. Beside equal eigenvalues, a rounding error may stay
// just above the limit for ever: then it is as small as it gets.
constexpr int kSweeps = 30;

const LanczosKernels& kernels() { return NMK_BEST(lanczos); }

void axpy(double factor, const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// Computes the eigenvalues of the symmetric a [m, m], which is overwritten, and multiplies z [m columns of `rows`] by
// its eigenvectors: Householder tridiagonalization and implicit QR (Golub and Van Loan, Matrix Computations, 8.3).
void symmetric_eigen(double* a, int64_t m, double* diagonal, double* z, int64_t rows) {
  std::vector<double> off(m), v(m), w(m), zv(rows);
  for (int64_t k = 0; k + 2 < m; ++k) {
    const int64_t n = m - k - 1;
    double squares = 0;
    for (int64_t i = 1; i < n; ++i) squares += a[(k + 1 + i) * m + k] * a[(k + 1 + i) * m + k];
    if (squares == 0) continue;  // already tridiagonal
    for (int64_t i = 0; i < n; ++i) v[i] = a[(k + 1 + i) * m + k];
    const double length = std::copysign(std::sqrt(squares + v[0] * v[0]), v[0]);
    v[0] += length;
    const double scale = 1 / std::sqrt(squares + v[0] * v[0]);
    for (int64_t i = 0; i < n; ++i) v[i] *= scale;
    a[(k + 1) * m + k] = -length;
    double* rest = a + (k + 1) * m + k + 1;
    double vw = 0;
    for (int64_t i = 0; i < n; ++i) {
      w[i] = 0;
      for (int64_t j = 0; j < n; ++j) w[i] += rest[i * m + j] * v[j];
      vw += v[i] * w[i];
    }
    for (int64_t i = 0; i < n; ++i) w[i] -= vw * v[i];
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) rest[i * m + j] -= 2 * (v[i] * w[j] + w[i] * v[j]);
    }
    std::fill(zv.begin(), zv.end(), 0.0);
    for (int64_t i = 0; i < n; ++i) axpy(v[i], z + (k + 1 + i) * rows, zv.data(), rows);
    for (int64_t i = 0; i < n; ++i) axpy(-2 * v[i], zv.data(), z + (k + 1 + i) * rows, rows);
  }
  double norm = 0;
  for (int64_t i = 0; i < m; ++i) {
    diagonal[i] = a[i * m + i];
    off[i] = i + 1 < m ? a[(i + 1) * m + i] : 0;
    norm = std::max(norm, std::abs(diagonal[i]) + std::abs(off[i]));
  }
  const auto negligible = [&](int64_t i) { return std::abs(off[i]) <= 1e-17 * norm; };
  int sweeps = 0;
  for (int64_t high = m - 1; high > 0;) {
    if (sweeps == kSweeps || negligible(high - 1)) {
      --high, sweeps = 0;
      continue;
    }
    ++sweeps;
    int64_t low = high - 1;
    while (low > 0 && !negligible(low - 1)) --low;
    const double half = (diagonal[high - 1] - diagonal[high]) / 2, e = off[high - 1];
    const double shift = diagonal[high] - e * e / (half + std::copysign(std::sqrt(half * half + e * e), half));
    double x = diagonal[low] - shift, y = off[low];
    for (int64_t k = low; k < high; ++k) {
      const double r = std::sqrt(x * x + y * y), c = r > 0 ? x / r : 1, s = r > 0 ? y / r : 0;
      if (k > low) off[k - 1] = r;
      const double d1 = diagonal[k], d2 = diagonal[k + 1], b = off[k];
      diagonal[k] = c * c * d1 + 2 * c * s * b + s * s * d2;
      diagonal[k + 1] = s * s * d1 - 2 * c * s * b + c * c * d2;
      off[k] = c * s * (d2 - d1) + (c * c - s * s) * b;
      if (k + 1 < high) {
        x = off[k], y = s * off[k + 1];
        off[k + 1] *= c;
      }
      double *left = z + k * rows, *right = left + rows;
      for (int64_t i = 0; i < rows; ++i) {
        const double l = left[i], g = right[i];
        left[i] = c * l + s * g;
        right[i] = c * g - s * l;
      }
    }
  }
}

}  // namespace

double* Lanczos::prepare(int64_t n, int64_t wanted, int64_t max_products) {
  n_ = n;
  wanted_ = width_ = std::max<int64_t>(0, std::min(wanted, n - 1));
  steps_ = std::max<int64_t>(0, std::min(max_products, n - 1));
  memory_ = vector_memory_.reserve((1 + steps_ + 2 * width_) * n);
  product_ = memory_ + (1 + steps_ + width_) * n;
  const int64_t vectors = steps_ + width_;
  if (static_cast<int64_t>(entries_.size()) < vectors * steps_) entries_.resize(vectors * steps_);
  size_ = products_ = 0;
  values_.clear(), residuals_.clear();
  return memory_;
}

// Removes from y its part in the span of the known vector and the basis, writes its coefficients and returns the norm
// of y. The second pass removes rounding errors.
double Lanczos::orthogonalize(double* y, double* coefficients) const {
  std::fill_n(coefficients, size_, 0.0);
  std::vector<double> part(size_ + 1);
  for (int pass = 0; pass < 2; ++pass) {
    kernels().project(memory_, size_ + 1, n_, y, part.data());
    kernels().add(memory_, size_ + 1, n_, -1, part.data(), y);
    for (int64_t j = 0; j < size_; ++j) coefficients[j] += part[j + 1];
  }
  return std::sqrt(dot(y, y, n_));
}

bool Lanczos::append(double* y, double norm) {
  if (norm < kExhausted || size_ == n_ - 1) return false;
  double* next = basis(size_++);
  for (int64_t i = 0; i < n_; ++i) next[i] = y[i] / norm;
  return true;
}

void Lanczos::solve(double tolerance, const Multiply& multiply) {
  std::vector<double> coefficients(steps_ + width_);
  uint64_t state = 0x9e3779b97f4a7c15ull;
  for (int64_t j = 0; j < width_; ++j) {
    double* q = product_;
    for (int64_t i = 0; i < n_; ++i) {
      // splitmix64: random start vectors, so that no eigenvector is orthogonal to them
      uint64_t z = state += 0x9e3779b97f4a7c15ull;
      z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
      z = (z ^ z >> 27) * 0x94d049bb133111ebull;
      q[i] = static_cast<double>(static_cast<int64_t>(z ^ z >> 31)) * 0x1p-63;
    }
    append(q, orthogonalize(q, coefficients.data()));
  }
  for (done_ = size_ == 0; !done_;) {
    const int64_t first = products_, count = std::min(size_, steps_) - first;
    multiply(basis(first), count, product_);
    for (int64_t c = 0; c < count; ++c) {
      double *y = product_ + c * n_, *column = &entry(0, first + c);
      std::fill_n(column, steps_ + width_, 0.0);
      const double norm = orthogonalize(y, column);
      if (append(y, norm)) column[size_ - 1] = norm;
    }
    products_ += count;
    ritz(tolerance, products_ == size_ || products_ == steps_);
  }
}

// Computes the Ritz pairs in the span of the multiplied vectors. Residuals come from the rest of the basis; vectors are
// computed only when all residuals are small or in the `last` step.
void Lanczos::ritz(double tolerance, bool last) {
  const int64_t m = products_, rest = size_ - m;
  const auto solve = [&](int64_t rows) {  // ritz_ [m, rows]: the required rows of the eigenvectors
    small_.resize(m * m), diagonal_.resize(m);
    for (int64_t j = 0; j < m; ++j) {
      // entries farther from the diagonal than the block's width are rounding errors
      for (int64_t i = 0; i <= j; ++i) small_[i * m + j] = small_[j * m + i] = j - i > width_ ? 0 : entry(i, j);
    }
    symmetric_eigen(small_.data(), m, diagonal_.data(), ritz_.data(), rows);
    order_.resize(m);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return diagonal_[a] > diagonal_[b]; });
  };
  ritz_.assign(m * rest, 0.0);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = 0; i < rest; ++i) ritz_[j * rest + i] = entry(m + i, j);
  }
  solve(rest);
  values_.clear(), residuals_.clear();
  done_ = true;
  for (int64_t j = 0; j < std::min(wanted_, m); ++j) {
    const double* row = ritz_.data() + order_[j] * rest;
    values_.push_back(diagonal_[order_[j]]);
    residuals_.push_back(std::sqrt(std::inner_product(row, row + rest, row, 0.0)));
    done_ = done_ && residuals_.back() <= tolerance;
  }
  done_ = last || (done_ && m >= wanted_);
  if (!done_) return;
  ritz_.assign(m * m, 0.0);
  for (int64_t i = 0; i < m; ++i) ritz_[i * m + i] = 1;
  solve(m);
}

void Lanczos::vector(int64_t j, double* out) const {
  std::fill_n(out, n_, 0.0);
  kernels().add(basis(0), products_, n_, 1, ritz_.data() + order_[j] * products_, out);
}

}  // namespace namedmask::cpu
