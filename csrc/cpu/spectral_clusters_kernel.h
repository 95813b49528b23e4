// SPDX-License-Identifier: MIT
// spectral_clusters' inner loops, compiled once per instruction level; level.h describes the rules.
#include "simd.h"
#include "spectral_clusters_levels.h"

namespace namedmask::cpu {
namespace {

double cosine(const float* a, const float* b, int64_t channels) {
  Doubles8 lanes[4] = {};  // independent sums
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) {
    for (int v = 0; v < 4; ++v)
      lanes[v] = add_exact_product(load_widened(a + c + 8 * v), load_widened(b + c + 8 * v), lanes[v]);
  }
  for (int l = 0; c < channels; ++c, ++l) lanes[l / 8][l % 8] += static_cast<double>(a[c]) * b[c];
  return sum_of_lanes((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

constexpr int64_t kTogether = 3;  // vectors that share a pass over the rows

template <int kCount>
void project_few(const float* rows, int64_t n, int64_t channels, const double* x, int64_t stride, double* sums) {
  for (int64_t i = 0; i < kCount * channels; ++i) sums[i] = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float* row = rows + i * channels;
    double factor[kCount][4];  // a copy, which stores to sums cannot alias
    for (int v = 0; v < kCount; ++v) __builtin_memcpy(factor[v], x + v * stride + i, sizeof factor[v]);
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      Doubles8 f[4];
      for (int r = 0; r < 4; ++r) f[r] = load_widened(row + r * channels + c);
#pragma GCC unroll 3
      for (int v = 0; v < kCount; ++v) {
        double* sum = sums + v * channels + c;
        Doubles8 more = load<Doubles8>(sum);
        for (int r = 0; r < 4; ++r) more = add_exact_product(f[r], broadcast<Doubles8>(factor[v][r]), more);
        store(sum, more);
      }
    }
    for (; c < channels; ++c) {
      for (int v = 0; v < kCount; ++v) {
        for (int r = 0; r < 4; ++r) sums[v * channels + c] += row[r * channels + c] * factor[v][r];
      }
    }
  }
  for (; i < n; ++i) {
    for (int v = 0; v < kCount; ++v) {
      for (int64_t c = 0; c < channels; ++c) sums[v * channels + c] += rows[i * channels + c] * x[v * stride + i];
    }
  }
}

template <int kCount, int kHere>
void expand_rows(const float* rows, int64_t channels, const double* sums, double* out, int64_t stride) {
  Doubles8 lanes[kCount][kHere] = {};
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    Doubles8 f[kHere];
    for (int r = 0; r < kHere; ++r) f[r] = load_widened(rows + r * channels + c);
#pragma GCC unroll 3
    for (int v = 0; v < kCount; ++v) {
      const Doubles8 sum = load<Doubles8>(sums + v * channels + c);
      for (int r = 0; r < kHere; ++r) lanes[v][r] = add_exact_product(f[r], sum, lanes[v][r]);
    }
  }
  for (int l = 0; c < channels; ++c, ++l) {
    for (int v = 0; v < kCount; ++v) {
      for (int r = 0; r < kHere; ++r) lanes[v][r][l] += rows[r * channels + c] * sums[v * channels + c];
    }
  }
  for (int v = 0; v < kCount; ++v) {
    for (int r = 0; r < kHere; ++r) out[v * stride + r] = sum_of_lanes(lanes[v][r]);
  }
}

template <int kCount>
void expand_few(const float* rows, int64_t n, int64_t channels, const double* sums, double* out, int64_t stride) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) expand_rows<kCount, 4>(rows + i * channels, channels, sums, out + i, stride);
  for (; i < n; ++i) expand_rows<kCount, 1>(rows + i * channels, channels, sums, out + i, stride);
}

void project(const float* rows, int64_t n, int64_t channels, const double* x, int64_t count, int64_t stride,
             double* sums) {
  for (; count >= kTogether; count -= kTogether, x += kTogether * stride, sums += kTogether * channels) {
    project_few<kTogether>(rows, n, channels, x, stride, sums);
  }
  if (count == 2) project_few<2>(rows, n, channels, x, stride, sums);
  if (count == 1) project_few<1>(rows, n, channels, x, stride, sums);
}

void expand(const float* rows, int64_t n, int64_t channels, const double* sums, int64_t count, double* out,
            int64_t stride) {
  for (; count >= kTogether; count -= kTogether, sums += kTogether * channels, out += kTogether * stride) {
    expand_few<kTogether>(rows, n, channels, sums, out, stride);
  }
  if (count == 2) expand_few<2>(rows, n, channels, sums, out, stride);
  if (count == 1) expand_few<1>(rows, n, channels, sums, out, stride);
}

void assign(const double* points, int64_t n, int64_t dims, const double* centers, int64_t k, double* distance,
            int64_t* label) {
  constexpr int64_t kPart = 64;  // points per pass
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t here = n - first < kPart ? n - first : kPart;
    double best[kPart], squares[kPart];
    int64_t nearest[kPart];
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t i = 0; i < kPart; ++i) squares[i] = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const double center = centers[c * dims + d];
        const double* at = points + d * n + first;
        for (int64_t i = 0; i < here; ++i) squares[i] += (at[i] - center) * (at[i] - center);
      }
      for (int64_t i = 0; i < kPart; ++i) {
        const bool closer = c == 0 || squares[i] < best[i];
        best[i] = closer ? squares[i] : best[i];
        nearest[i] = closer ? c : nearest[i];
      }
    }
    for (int64_t i = 0; i < here; ++i) distance[first + i] = best[i], label[first + i] = nearest[i];
  }
}

void add_up(const double* points, int64_t n, int64_t dims, const int64_t* label, int64_t k, double* sums,
            int64_t* sizes) {
  typedef IntsOf<Doubles8> Bits;
  constexpr int kAtOnce = 4;  // centers that share the reads
  for (int64_t c = 0; c < k; ++c) {
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) size += label[i] == c;
    sizes[c] = size;
  }
  for (int64_t first = 0; first < k; first += kAtOnce) {
    for (int64_t d = 0; d < dims; ++d) {
      Doubles8 lanes[kAtOnce] = {};
      int64_t i = 0;
      for (; i + 8 <= n; i += 8) {
        Bits labels, values;
        __builtin_memcpy(&labels, label + i, sizeof labels);
        __builtin_memcpy(&values, points + d * n + i, sizeof values);
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce; ++c) lanes[c] += (Doubles8)(values & (labels == first + c));
      }
      for (int l = 0; i < n; ++i, ++l) {
        for (int c = 0; c < kAtOnce; ++c) lanes[c][l] += label[i] == first + c ? points[d * n + i] : 0;
      }
      for (int c = 0; c < kAtOnce && first + c < k; ++c) sums[(first + c) * dims + d] = sum_of_lanes(lanes[c]);
    }
  }
}

constexpr ClusterKernels kKernels = {cosine, project, expand, assign, add_up};

}  // namespace
}  // namespace namedmask::cpu
