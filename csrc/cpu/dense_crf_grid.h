// SPDX-License-Identifier: MIT
// dense_crf's spatial grid, the Gaussian term; part of dense_crf_kernel.h.
#pragma once

#include "dense_crf_channels.h"

namespace namedmask::cpu {
namespace {

// out[i] = sum over t from -before to after of gauss[|t|] * in[i + t * stride], i < n, a multiple of kGroup.
inline void convolve(const float* in, int64_t stride, const float* gauss, int64_t before, int64_t after, float* out,
                     int64_t n) {
  constexpr int kTurns = 4, kStep = sizeof(Wide) / sizeof(float);  // independent sums
  int64_t whole = 0;
  for (; whole + kTurns * kStep <= n; whole += kTurns * kStep) {
    Wide sums[kTurns] = {};
    for (int64_t t = -before; t <= after; ++t) {
      const Wide factor = broadcast<Wide>(gauss[t < 0 ? -t : t]);
      const float* const from = in + whole + t * stride;
#pragma GCC unroll 4
      for (int v = 0; v < kTurns; ++v) sums[v] = fma(load<Wide>(from + v * kStep), factor, sums[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTurns; ++v) store(out + whole + v * kStep, sums[v]);
  }
  for_each_vector(n - whole, [&](auto v, int64_t i) {
    for (int64_t t = -before; t <= after; ++t) {
      v = fma(load<decltype(v)>(in + whole + i + t * stride), broadcast<decltype(v)>(gauss[t < 0 ? -t : t]), v);
    }
    store(out + whole + i, v);
  });
}

// Applies the Gaussian on the nodes (channels = 1): columns into one line, then along the line.
void blur_grid(CrfSystem s, const float* from, float* to) {
  fill(s.rows, 0.0f, s.grid_width + 2 * s.radius);
  for (int64_t y = 0; y < s.grid_height; ++y) {
    const int64_t before = y < s.radius ? y : s.radius, left = s.grid_height - 1 - y;
    convolve(from + y * s.grid_width, s.grid_width, s.gauss, before, left < s.radius ? left : s.radius,
             s.rows + s.radius, s.grid_width);
    convolve(s.rows + s.radius, 1, s.gauss, s.radius, s.radius, to + y * s.grid_width, s.grid_width);
  }
}

// row = the grid interpolated at row y of the image.
inline void read_row(CrfSystem s, int64_t y, float* row) {
  const int64_t line = s.grid_width * s.channels;
  const float *nodes = s.grid + y / s.step * line, *taps = s.row_taps + y * kTaps;
  for_each_vector(line, [&](auto sum, int64_t i) {
    using V = decltype(sum);
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) sum = fma(load<V>(nodes + t * line + i), broadcast<V>(taps[t]), sum);
    store(row + i, sum);
  });
}

// Adds row y to the next grid. values [step, line_values]: the pixels of each phase, after kTaps - 1 nodes of zeros.
inline void add_row(CrfSystem s, int64_t y, const float* values, int64_t line_values) {
  const int64_t line = s.grid_width * s.channels;
  float* const nodes = s.next_grid + y / s.step * line;
  const float* const row_taps = s.add_taps + y * kTaps;
  for_each_vector(line, [&](auto sum, int64_t i) {
    using V = decltype(sum);
    const float* phase = values + i;
    for (int64_t p = 0; p < s.step; ++p, phase += line_values) {
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) {
        sum = fma(load<V>(phase + (kTaps - 1 - t) * s.channels), broadcast<V>(s.taps[p * kTaps + t]), sum);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
      float* const node = nodes + t * line + i;
      store(node, fma(sum, broadcast<V>(row_taps[t]), load<V>(node)));
    }
  });
}

// rows [count, items, channels] = the grid's nodes from `first` on, interpolated at rows y, y + 1, ... of the image,
// which have the same nodes.
inline void read_rows(CrfSystem s, int64_t channels, int64_t y, int64_t count, int64_t first, float* rows,
                      int64_t items) {
  const int64_t line = s.grid_width * channels;
  const float *const nodes = s.grid + y / s.step * line, *const taps = s.row_taps + y * kTaps;
  for_each_plane(channels, [&](int64_t c, int64_t lanes) {
    const float* const from = nodes + c * s.grid_width + first * lanes;
    for_each_vector(items * lanes, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      V node[kTaps];
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) {
        node[t] = load<V>(from + t * line + i);
      }
      __builtin_prefetch(from + kTaps * line + i);  // one more row is read next; without, updates take 2% more (Zen 4)
      for (int64_t r = 0; r < count; ++r) {
        V sum = {};
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) sum = fma(node[t], broadcast<V>(taps[r * kTaps + t]), sum);
        store(rows + (r * channels + c) * items + i, sum);
      }
    });
  });
}

// sums [cells + kTaps, channels] = what a row of a tile adds to the nodes from its first cell on. values [step, items,
// channels]: its pixels by phase, between kTaps - 1 and kTaps + 1 zeros.
inline void add_cells(CrfSystem s, int64_t channels, const float* values, int64_t items, float* sums) {
  constexpr int kNodes = 4;  // at once
  const int64_t nodes = items - kTaps;
  for_each_vector(channels, [&](auto zero, int64_t c) {
    using V = decltype(zero);
    const Place of_cell = place(c, channels, items), of_node = place(c, channels, nodes);
    for (int64_t n = 0; n < nodes; n += kNodes) {
      V sum[kNodes] = {};
      const float *cell = values + of_cell.begin + n * of_cell.stride, *taps = s.taps;
      for (int64_t p = 0; p < s.step; ++p, cell += items * channels, taps += kTaps) {
        V cells[kNodes + kTaps - 1];
#pragma GCC unroll 7
        for (int i = 0; i < kNodes + kTaps - 1; ++i) cells[i] = load<V>(cell + i * of_cell.stride);
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 4
          for (int i = 0; i < kNodes; ++i) sum[i] = fma(cells[i + kTaps - 1 - t], broadcast<V>(taps[t]), sum[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kNodes; ++i) store(sums + of_node.begin + (n + i) * of_node.stride, sum[i]);
    }
  });
}

// Row n of the next grid, of which only the last `ring` rows are kept.
inline float* ring_row(const CrfSystem& s, int64_t channels, int64_t n) {
  return s.next_grid + n % s.ring * s.grid_width * channels;
}

// Adds sums [count, nodes, channels] of rows y, y + 1, ..., which have the same nodes, to the next grid's nodes from
// `first` on.
inline void add_rows(CrfSystem s, int64_t channels, int64_t y, int64_t count, int64_t first, const float* sums,
                     int64_t nodes) {
  float* rows[kTaps];
  for (int t = 0; t < kTaps; ++t) rows[t] = ring_row(s, channels, y / s.step + t);
  const float* const taps = s.add_taps + y * kTaps;
  for_each_plane(channels, [&](int64_t c, int64_t lanes) {
    const int64_t begin = c * s.grid_width + first * lanes;
    for_each_vector(nodes * lanes, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      V node[kTaps];
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) node[t] = load<V>(rows[t] + begin + i);
      for (int64_t r = 0; r < count; ++r) {
        const V sum = load<V>(sums + (r * channels + c) * nodes + i);
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) node[t] = fma(sum, broadcast<V>(taps[r * kTaps + t]), node[t]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) store(rows[t] + begin + i, node[t]);
    });
  });
}

// Applies the Gaussian on the nodes: columns into `columns` [count, channels, padded nodes], then along the lines.
// Writes rows first, first + 1, ... of the grid, count <= kBlurRows.
inline void blur_rows(CrfSystem s, int64_t channels, int64_t first, int64_t count, float* columns) {
  const int64_t padded = s.grid_width + 2 * s.radius, line = s.grid_width * channels;
  const int64_t begin = first < s.radius ? 0 : first - s.radius, last = first + count - 1 + s.radius,
                end = last < s.grid_height ? last + 1 : s.grid_height;
  for_each_plane(channels, [&](int64_t c, int64_t lanes) {
    const int64_t pad = s.radius * lanes;
    const float* const first_row = ring_row(s, channels, begin) + c * s.grid_width;
    const float* const stop = s.next_grid + s.ring * line;
    const auto blur_columns = [&](auto zero, auto turns, int64_t i) {
      using V = decltype(zero);
      constexpr int kTurns = decltype(turns)::value;
      V sums[kBlurRows][kTurns] = {};
      const float *from = first_row + i, *gauss = s.gauss + (begin - first);
      for (int64_t n = begin; n < end; ++n, from += line, ++gauss) {
        if (from >= stop) from -= s.ring * line;
#pragma GCC unroll 4
        for (int r = 0; r < kBlurRows; ++r) {
          const V factor = broadcast<V>(gauss[-r]);
#pragma GCC unroll 4
          for (int v = 0; v < kTurns; ++v) sums[r][v] = fma(load<V>(from + v * kLanesOf<V>), factor, sums[r][v]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kBlurRows; ++r) {  // an index that is no constant would keep the sums in memory
        float* const to = columns + (r * channels + c) * padded + pad + i;
#pragma GCC unroll 4
        for (int v = 0; v < kTurns; ++v) store(to + v * kLanesOf<V>, sums[r][v]);
      }
    };
    constexpr int kTurns = kLanes > 8 ? 4 : 2, kStep = sizeof(Wide) / sizeof(float);  // more do not fit the registers
    const int64_t n = s.grid_width * lanes;
    int64_t whole = 0;
    for (; whole + kTurns * kStep <= n; whole += kTurns * kStep) {
      blur_columns(Wide{}, std::integral_constant<int, kTurns>{}, whole);
    }
    for_each_vector(n - whole,
                    [&](auto v, int64_t i) { blur_columns(v, std::integral_constant<int, 1>{}, whole + i); });
    for (int64_t r = 0; r < count; ++r) {
      convolve(columns + (r * channels + c) * padded + pad, lanes, s.gauss, s.radius, s.radius,
               s.grid + (first + r) * line + c * s.grid_width, s.grid_width * lanes);
    }
  });
}

}  // namespace
}  // namespace namedmask::cpu
