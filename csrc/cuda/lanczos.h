// SPDX-License-Identifier: MIT
// The largest eigenpair of a symmetric matrix that is given only by its products and has known eigenvectors, by a team
// of warps, all of whose threads call these functions. Lanczos as in csrc/cpu/lanczos.h, with one start vector; every
// new vector is orthogonalized twice against all earlier ones.
#pragma once

#include <cmath>

#include "team.h"

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
  int32_t products;
};

template <class Team>
struct Lanczos {
  static constexpr int kThreads = Team::kThreads;
  static constexpr int kAtOnce = 4;  // vectors whose loads do not wait for each other

  // The number of doubles at `small`.
  __host__ __device__ static int64_t small_size(int64_t steps) { return 5 * steps + 2; }

  Team& team;               // its reductions take known + steps values
  int32_t n, known, steps;  // steps: maximum number of products
  int64_t stride;
  double* vectors;  // the known vectors, then the basis [steps]; `stride` elements apart
  double* product;  // [n]
  double* small;

  // A thread accesses only its own entries of `vectors` and `product`: its number's, and every kThreads-th after it.
  __device__ double* basis(int32_t j) const { return vectors + (known + j) * stride; }
  __device__ double* alpha() const { return small; }
  __device__ double* beta() const { return small + steps; }
  __device__ double* forward() const { return small + 2 * steps; }
  __device__ double* backward() const { return small + 3 * steps; }
  __device__ double* ritz() const { return small + 4 * steps; }
  __device__ double* result() const { return small + 5 * steps; }  // value, residual

  // multiply(q): product = the matrix times q; a thread reads and writes only its own entries of both. `start`: seed of
  // the start vector. The eigenvector is basis * ritz, with a residual of at most `tolerance` unless `steps` was
  // reached first.
  template <class Multiply>
  __device__ Pair solve(uint32_t start, double tolerance, Multiply multiply) const {
    double diagonal;
    for (int32_t i = Team::thread(); i < n; i += kThreads) {
      // a random start vector, so that no eigenvector is orthogonal to it
      product[i] = static_cast<double>(static_cast<int64_t>(mix(kMixStep * (start + static_cast<uint32_t>(i) + 2))));
    }
    append(0, orthogonalize(0, &diagonal));
    for (int32_t m = 1;; ++m) {
      multiply(basis(m - 1));
      const double norm = orthogonalize(m, &diagonal);
      if (Team::warp() == 0) {
        if (threadIdx.x == 0) alpha()[m - 1] = diagonal, beta()[m - 1] = norm;
        __syncwarp();
        const double found = largest_eigenvalue(m);
        eigenvector(m, found);
        if (threadIdx.x == 0) result()[0] = found, result()[1] = norm * fabs(ritz()[m - 1]);
      }
      Team::sync();
      const Pair pair = {result()[0], result()[1], m};
      if (pair.residual <= tolerance || m == steps || norm < kExhausted) return pair;
      append(m, norm);
    }
  }

  // out = basis * ritz; out may be product.
  __device__ void vector(int32_t products, double* out) const {
    for (int32_t i = Team::thread(); i < n; i += kThreads) {
      double sum = 0;
      for (int32_t j = 0; j < products; ++j) sum += ritz()[j] * basis(j)[i];
      out[i] = sum;
    }
  }

 private:
  // Removes from the product its part in the span of the known vectors and the first `size` of the basis, twice because
  // of rounding, and returns its norm. `last`: the coefficient of the last of these vectors.
  __device__ double orthogonalize(int32_t size, double* last) const {
    const int32_t count = known + size;
    *last = 0;
    for (int pass = 0; pass < 2; ++pass) {
      double* const parts = team.next_parts();
      for_each_few(count, [&](int32_t j, const double* const(&some)[kAtOnce]) {
        double sums[kAtOnce] = {};
#pragma unroll 2
        for (int32_t i = Team::thread(); i < n; i += kThreads) {
          const double y = product[i];
          for (int k = 0; k < kAtOnce; ++k) sums[k] += some[k][i] * y;
        }
        for (int k = 0; k < kAtOnce; ++k) sums[k] = warp_reduce(sums[k], Sum());
        for (int k = 0; k < kAtOnce; ++k) {
          if (j + k < count) Team::put_of_warp(parts, j + k, sums[k]);
        }
      });
      Team::sync();
      for_each_few(count, [&](int32_t j, const double* const(&some)[kAtOnce]) {
        double coefficients[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) {
          coefficients[k] = Team::get(parts, min(j + k, count - 1), Sum());
        }
        for (int k = 0; k < kAtOnce; ++k) {
          if (j + k == count - 1) *last += coefficients[k];
          if (j + k >= count) coefficients[k] = 0;
        }
#pragma unroll 2
        for (int32_t i = Team::thread(); i < n; i += kThreads) {
          double y = product[i];
          for (int k = 0; k < kAtOnce; ++k) y -= coefficients[k] * some[k][i];
          product[i] = y;
        }
      });
    }
    double squares = 0;
    for (int32_t i = Team::thread(); i < n; i += kThreads) squares += product[i] * product[i];
    return sqrt(team.reduce(squares, Sum()));
  }

  // Calls use(j, vectors j, j + 1, ...) for j = 0, kAtOnce, ...; vectors from `count` on are repetitions.
  template <class Use>
  __device__ void for_each_few(int32_t count, Use use) const {
    for (int32_t j = 0; j < count; j += kAtOnce) {
      const double* some[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) some[k] = vectors + min(j + k, count - 1) * stride;
      use(j, some);
    }
  }

  // basis(j) = product / norm
  __device__ void append(int32_t j, double norm) const {
    const double factor = 1 / norm;
    for (int32_t i = Team::thread(); i < n; i += kThreads) basis(j)[i] = product[i] * factor;
  }

  // The largest eigenvalue of the symmetric tridiagonal matrix with diagonal alpha [m] and off-diagonal beta [m - 1]:
  // the lanes of a warp test values between two bounds until none is left between. A value x is too small if one of the
  // leading principal minors of x - matrix is negative; they follow from each other without a division.
  __device__ double largest_eigenvalue(int32_t m) const {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    double low = -INFINITY, high = -INFINITY;
    for (int32_t j = lane; j < m; j += 32) {
      const double before = j ? beta()[j - 1] : 0, after = j + 1 < m ? beta()[j] : 0;
      low = max(low, alpha()[j]);
      high = max(high, alpha()[j] + (before + after));
    }
    low = warp_reduce(low, Most());
    high = warp_reduce(high, Most());
    const auto candidate = [&](int k) { return low + (high - low) * ((k + 1) / 33.0); };
    for (int round = 0; round < 12; ++round) {  // 33^12 exceeds a double's precision
      const double x = candidate(lane);
      double before = 0, minor = 1;
      bool small_x = false;
      for (int32_t j = 0; j < m; ++j) {
        const double b = j ? beta()[j - 1] : 0, next = (x - alpha()[j]) * minor - b * b * before;
        before = minor;
        minor = next;
        small_x |= minor < 0;
        const double size = fabs(minor) + fabs(before);  // minors have no scale: no underflow, no overflow
        if (size < 1e-100) minor *= 1e100, before *= 1e100;
        if (size > 1e100) minor *= 1e-100, before *= 1e-100;
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
  // 1997). Lane 0 works upwards of that row, lane 1 downwards.
  __device__ void eigenvector(int32_t m, double eigenvalue) const {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const bool from_top = lane == 0;
    double* const pivots = from_top ? forward() : backward();
    if (lane < 2) {
      double pivot = 1;
      for (int32_t t = 0; t < m; ++t) {
        const int32_t j = from_top ? t : m - 1 - t;
        const double b = t ? beta()[from_top ? j - 1 : j] : 0;
        pivot = alpha()[j] - eigenvalue - b * b / pivot;
        if (pivot == 0) pivot = -1e-100;
        pivots[j] = pivot;
      }
    }
    __syncwarp();
    double least = INFINITY;
    int32_t meeting = 0;
    for (int32_t j = lane; j < m; j += 32) {
      const double after = j + 1 < m ? beta()[j] * beta()[j] / backward()[j + 1] : 0;
      const double remainder = fabs(forward()[j] - after);
      if (remainder < least) least = remainder, meeting = j;
    }
    const double smallest = warp_reduce(least, Least());
    meeting = warp_reduce(least == smallest ? meeting : m, Least());
    double squares = 0;
    if (lane < 2) {
      double entry = 1;
      for (int32_t j = from_top ? meeting - 1 : meeting + 1; j >= 0 && j < m; j += from_top ? -1 : 1) {
        entry *= -beta()[from_top ? j : j - 1] / pivots[j];
        ritz()[j] = entry;
        squares += entry * entry;
      }
      if (from_top) ritz()[meeting] = 1, squares += 1;
    }
    squares = warp_reduce(squares, Sum());
    __syncwarp();
    for (int32_t j = lane; j < m; j += 32) ritz()[j] /= sqrt(squares);
    __syncwarp();
  }
};

}  // namespace namedmask::cuda
