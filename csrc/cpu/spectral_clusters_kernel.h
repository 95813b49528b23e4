// SPDX-License-Identifier: MIT
// spectral_clusters' inner loops, included by one file per instruction level; level.h says what is allowed here.
#include "doubles.h"
#include "lanes.h"
#include "spectral_clusters_levels.h"

namespace namedmask::cpu {
namespace {

void range(const float* rows, int64_t count, const float* panels, int64_t channels, float* range) {
  V least = broadcast(-range[0]), most = broadcast(range[1]);  // least is kept with its sign turned
  for (int part = 0; part < kWord; part += kVectors * kLanes) {
    const auto columns = [=](int v) {
      const int column = part + v * kLanes;
      return panels + column / kPanel * channels * kPanel + column % kPanel;
    };
    for (int64_t r = 0; r < count; r += kRows) {
      V sums[kRows][kVectors] = {};
      multiply_add(sums, rows + r * channels, channels, columns, kPanel, channels);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          most = larger(most, sums[i][v]);
          least = larger(least, -sums[i][v]);
        }
      }
    }
  }
  float lanes[kLanes];
  store(lanes, least);
  for (float lane : lanes) range[0] = range[0] < -lane ? range[0] : -lane;
  store(lanes, most);
  for (float lane : lanes) range[1] = range[1] > lane ? range[1] : lane;
}

constexpr int64_t kTogether = 3;  // vectors that share a pass over the rows

template <int kCount>
void project_few(const float* rows, int64_t n, int64_t channels, const double* x, double* sums) {
  for (int64_t i = 0; i < kCount * channels; ++i) sums[i] = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float* row = rows + i * channels;
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      W f[4];
      for (int r = 0; r < 4; ++r) f[r] = widen(row + r * channels + c);
#pragma GCC unroll 3
      for (int v = 0; v < kCount; ++v) {
        const double* factor = x + v * n + i;
        double* sum = sums + v * channels + c;
        const W more = (f[0] * factor[0] + f[1] * factor[1]) + (f[2] * factor[2] + f[3] * factor[3]);
        write(sum, read(sum) + more);
      }
    }
    for (; c < channels; ++c) {
      for (int v = 0; v < kCount; ++v) {
        const double* factor = x + v * n + i;
        sums[v * channels + c] += (row[c] * factor[0] + row[channels + c] * factor[1]) +
                                  (row[2 * channels + c] * factor[2] + row[3 * channels + c] * factor[3]);
      }
    }
  }
  for (; i < n; ++i) {
    for (int v = 0; v < kCount; ++v) {
      for (int64_t c = 0; c < channels; ++c) sums[v * channels + c] += rows[i * channels + c] * x[v * n + i];
    }
  }
}

template <int kCount>
void expand_few(const float* rows, int64_t n, int64_t channels, const double* sums, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float* row = rows + i * channels;
    W lanes[kCount] = {};
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) {
      const W f = widen(row + c);
#pragma GCC unroll 3
      for (int v = 0; v < kCount; ++v) lanes[v] += f * read(sums + v * channels + c);
    }
    for (int l = 0; c < channels; ++c, ++l) {
      for (int v = 0; v < kCount; ++v) lanes[v][l] += row[c] * sums[v * channels + c];
    }
    for (int v = 0; v < kCount; ++v) out[v * n + i] = fold(lanes[v]);
  }
}

void project(const float* rows, int64_t n, int64_t channels, const double* x, int64_t count, double* sums) {
  for (; count >= kTogether; count -= kTogether, x += kTogether * n, sums += kTogether * channels) {
    project_few<kTogether>(rows, n, channels, x, sums);
  }
  if (count == 2) project_few<2>(rows, n, channels, x, sums);
  if (count == 1) project_few<1>(rows, n, channels, x, sums);
}

void expand(const float* rows, int64_t n, int64_t channels, const double* sums, int64_t count, double* out) {
  for (; count >= kTogether; count -= kTogether, sums += kTogether * channels, out += kTogether * n) {
    expand_few<kTogether>(rows, n, channels, sums, out);
  }
  if (count == 2) expand_few<2>(rows, n, channels, sums, out);
  if (count == 1) expand_few<1>(rows, n, channels, sums, out);
}

void assign(const double* points, int64_t n, int64_t dims, const double* centres, int64_t k, double* distance,
            int64_t* label) {
  constexpr int64_t kPart = 64;  // points in work at a time
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t here = n - first < kPart ? n - first : kPart;
    double best[kPart], squares[kPart];
    int64_t nearest[kPart];
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t i = 0; i < kPart; ++i) squares[i] = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const double centre = centres[c * dims + d];
        const double* at = points + d * n + first;
        for (int64_t i = 0; i < here; ++i) squares[i] += (at[i] - centre) * (at[i] - centre);
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

}  // namespace
}  // namespace namedmask::cpu
