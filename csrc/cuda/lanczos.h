// SPDX-License-Identifier: MIT
// The largest eigenpair of a symmetric matrix that is given only by its products and has known eigenvectors, by a
// thread block of kWarps warps, all of whose threads call these functions. Lanczos as in csrc/cpu/lanczos.h, with one
// start vector; every new vector is orthogonalized twice against all earlier ones.
#pragma once

#include <cmath>

#include "block.h"

namespace namedmask::cuda {

constexpr double kExhausted = 1e-13;  // if less remains of a unit vector's product, it is in the span of the basis

// splitmix64's, as on the CPU.
__device__ inline uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
constexpr uint64_t kMixStep = 0x9e3779b97f4a7c15ull;

struct Pair {
  double value, residual;
  int64_t products;
};

template <int kWarps>
struct Lanczos {
  static constexpr int kThreads = 32 * kWarps;

  int64_t n, stride, known, steps;  // steps: maximum number of products
  double* vectors;                  // the known vectors, then the basis [steps]; `stride` elements apart
  double* product;                  // [n]
  double* small;                    // [6 steps + known]

  __device__ double* basis(int64_t j) const { return vectors + (known + j) * stride; }
  __device__ double* alpha() const { return small; }
  __device__ double* beta() const { return small + steps; }
  __device__ double* forward() const { return small + 2 * steps; }
  __device__ double* backward() const { return small + 3 * steps; }
  __device__ double* ritz() const { return small + 4 * steps; }
  __device__ double* coefficients() const { return small + 5 * steps; }

  // multiply(q): product = the matrix times q, visible to all threads. `start`: seed of the start vector. The
  // eigenvector is basis * ritz, with a residual of at most `tolerance` unless `steps` was reached first.
  template <class Multiply>
  __device__ Pair solve(uint64_t start, double tolerance, Multiply multiply) const {
    __shared__ double value, residual;
    double diagonal;
    for (auto i = static_cast<int64_t>(threadIdx.x); i < n; i += kThreads) {
      // a random start vector, so that no eigenvector is orthogonal to it
      product[i] = static_cast<double>(static_cast<int64_t>(mix(kMixStep * (start + static_cast<uint64_t>(i) + 2))));
    }
    __syncthreads();
    append(0, orthogonalize(0, &diagonal));
    for (int64_t m = 1;; ++m) {
      multiply(basis(m - 1));
      const double norm = orthogonalize(m, &diagonal);
      if (threadIdx.x < 32) {
        if (threadIdx.x == 0) alpha()[m - 1] = diagonal, beta()[m - 1] = norm;
        __syncwarp();
        const double found = largest_eigenvalue(m);
        if (threadIdx.x == 0) {
          eigenvector(m, found);
          value = found;
          residual = norm * fabs(ritz()[m - 1]);
        }
      }
      __syncthreads();
      if (residual <= tolerance || m == steps || norm < kExhausted) return {value, residual, m};
      append(m, norm);
    }
  }

  // out = basis * ritz; out may be product.
  __device__ void vector(int64_t products, double* out) const {
    for (auto i = static_cast<int64_t>(threadIdx.x); i < n; i += kThreads) {
      double sum = 0;
      for (int64_t j = 0; j < products; ++j) sum += ritz()[j] * basis(j)[i];
      out[i] = sum;
    }
  }

 private:
  // Removes from the product its part in the span of the known vectors and the first `size` of the basis, twice because
  // of rounding, and returns its norm. `last`: the coefficient of the last of these vectors.
  __device__ double orthogonalize(int64_t size, double* last) const {
    const auto thread = static_cast<int64_t>(threadIdx.x);
    const int64_t count = known + size;
    double squares = 0;
    *last = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = thread / 32; j < count; j += kWarps) {
        double sum = 0;
        for (int64_t i = thread % 32; i < n; i += 32) sum += vectors[j * stride + i] * product[i];
        sum = warp_reduce(sum, Sum());
        if (thread % 32 == 0) coefficients()[j] = sum;
      }
      __syncthreads();
      squares = 0;
      for (int64_t i = thread; i < n; i += kThreads) {
        double y = product[i];
        for (int64_t j = 0; j < count; ++j) y -= coefficients()[j] * vectors[j * stride + i];
        product[i] = y;
        squares += y * y;
      }
      *last += coefficients()[count - 1];
      squares = block_reduce<kWarps>(squares, Sum());
    }
    return sqrt(squares);
  }

  // basis(j) = product / norm
  __device__ void append(int64_t j, double norm) const {
    for (auto i = static_cast<int64_t>(threadIdx.x); i < n; i += kThreads) basis(j)[i] = product[i] / norm;
    __syncthreads();
  }

  // The largest eigenvalue of the symmetric tridiagonal matrix with diagonal alpha [m] and off-diagonal beta [m - 1]:
  // the lanes of a warp test values between two bounds until none is left between. A value is too small if elimination
  // from the top has a positive pivot.
  __device__ double largest_eigenvalue(int64_t m) const {
    double low = -INFINITY, high = -INFINITY;
    for (int64_t j = 0; j < m; ++j) {
      const double before = j ? beta()[j - 1] : 0, after = j + 1 < m ? beta()[j] : 0;
      low = max(low, alpha()[j]);
      high = max(high, alpha()[j] + (before + after));
    }
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const auto candidate = [&](int k) { return low + (high - low) * ((k + 1) / 33.0); };
    for (int round = 0; round < 12; ++round) {  // 33^12 exceeds a double's precision
      const double x = candidate(lane);
      bool small_x = false;
      double pivot = -1;
      for (int64_t j = 0; j < m && !small_x; ++j) {
        pivot = alpha()[j] - x - (j ? beta()[j - 1] * beta()[j - 1] / pivot : 0);
        if (pivot == 0) pivot = -1e-300;
        small_x = pivot > 0;
      }
      const int below = __popc(__ballot_sync(kAllLanes, small_x));
      const double new_low = below > 0 ? candidate(below - 1) : low;
      high = below < 32 ? candidate(below) : high;
      low = new_low;
    }
    return high;
  }

  // ritz [m]: the unit eigenvector of that eigenvalue, computed from the row where elimination from the top and from
  // the bottom meet with the smallest remainder (Parlett and Dhillon, Fernando's solution to Wilkinson's problem,
  // 1997).
  __device__ void eigenvector(int64_t m, double eigenvalue) const {
    const auto pivot = [](double x) { return x == 0 ? -1e-100 : x; };
    for (int64_t j = 0; j < m; ++j) {
      const double before = j ? beta()[j - 1] * beta()[j - 1] / forward()[j - 1] : 0;
      forward()[j] = pivot(alpha()[j] - eigenvalue - before);
    }
    double least = INFINITY;
    int64_t meeting = 0;
    for (int64_t j = m - 1; j >= 0; --j) {
      const double after = j + 1 < m ? beta()[j] * beta()[j] / backward()[j + 1] : 0;
      backward()[j] = pivot(alpha()[j] - eigenvalue - after);
      const double remainder = fabs(forward()[j] - after);
      if (remainder < least) least = remainder, meeting = j;
    }
    double squares = 1;
    ritz()[meeting] = 1;
    for (int64_t j = meeting - 1; j >= 0; --j) {
      ritz()[j] = -beta()[j] / forward()[j] * ritz()[j + 1];
      squares += ritz()[j] * ritz()[j];
    }
    for (int64_t j = meeting + 1; j < m; ++j) {
      ritz()[j] = -beta()[j - 1] / backward()[j] * ritz()[j - 1];
      squares += ritz()[j] * ritz()[j];
    }
    for (int64_t j = 0; j < m; ++j) ritz()[j] /= sqrt(squares);
  }
};

}  // namespace namedmask::cuda
