// SPDX-License-Identifier: MIT
// The largest eigenpairs of a symmetric matrix that is given only by its products and has one known eigenvector.
//
// Block Lanczos with one start vector per wanted pair, so that multiple eigenvalues are found as often as they occur.
// Every new vector is orthogonalized twice against all earlier ones. Exhausted directions leave the block. (A. Ruhe,
// Implementation aspects of band Lanczos algorithms, Math. Comp. 33, 1979.)
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "normalized_rows.h"

namespace namedmask::cpu {

class Lanczos {
 public:
  // out [count, n] = the matrix times each of vectors [count, n].
  using Multiply = std::function<void(const double* vectors, int64_t count, double* out)>;

  // Allocates for matrices of n rows, `wanted` pairs (at most n - 1 are found) and at most max_products products.
  // Returns the buffer of the known eigenvector [n]; the caller fills it with norm 1.
  double* prepare(int64_t n, int64_t wanted, int64_t max_products);

  // Stops when every wanted residual is at most `tolerance`, after max_products, or when the space is exhausted. The
  // norm of the matrix should be about 1. Deterministic.
  void solve(double tolerance, const Multiply& multiply);

  // The eigenpairs, largest first: |matrix v - value v| = residual, |v| = 1.
  int64_t found() const { return static_cast<int64_t>(values_.size()); }
  double value(int64_t j) const { return values_[j]; }
  double residual(int64_t j) const { return residuals_[j]; }
  int64_t products() const { return products_; }
  void vector(int64_t j, double* out) const;

  size_t bytes() const { return vector_memory_.bytes(); }

 private:
  double orthogonalize(double* y, double* coefficients) const;
  bool append(double* y, double norm);
  void ritz(double tolerance, bool last);

  double* basis(int64_t j) const { return memory_ + (j + 1) * n_; }
  double& entry(int64_t i, int64_t j) { return entries_[j * (steps_ + width_) + i]; }

  int64_t n_ = 0, wanted_ = 0, width_ = 0, steps_ = 0;  // steps_: maximum number of products
  int64_t size_ = 0, products_ = 0;                     // vectors in the basis, and how many of them are multiplied
  bool done_ = false;
  Buffer<double> vector_memory_;
  double* memory_ = nullptr;     // the known vector, then the basis
  double* product_ = nullptr;    // [width, n]
  std::vector<double> entries_;  // column j: coefficients in the basis of the matrix times vector j
  std::vector<double> small_, diagonal_, ritz_;
  std::vector<double> values_, residuals_;
  std::vector<int64_t> order_;
};

}  // namespace namedmask::cpu
