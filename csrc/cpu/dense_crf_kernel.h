// SPDX-License-Identifier: MIT
// dense_crf's inner loops, compiled once per instruction level; level.h describes the rules.
//
// This file has the mean field; dense_crf_lattice.h and dense_crf_grid.h have the filters of its two terms.
#include "dense_crf_grid.h"
#include "dense_crf_lattice.h"
#include "exponential.h"

namespace namedmask::cpu {
namespace {

// log2(x) for positive normal numbers.
inline Floats8 log2(Floats8 x) {
  const Ints8 exponent = (bits(x) - 0x3f3504f3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2)]
  const Floats8 m = reinterpret_cast<Floats8>(bits(x) - (exponent << 23)),
                n = __builtin_convertvector(exponent, Floats8);
  const Floats8 s = (m - 1.0f) / (m + 1.0f), square = s * s;  // ln(m) = 2 atanh(s), |s| < 0.18
  constexpr float kTwice = 2 * kLog2E;
  return fma(s, polynomial(square, kTwice / 9, kTwice / 7, kTwice / 5, kTwice / 3, kTwice), n);
}

inline Floats8 clipped(Floats8 p) { return smaller(larger(p, broadcast<Floats8>(1e-5f)), broadcast<Floats8>(1.0f)); }

bool start(CrfSystem s, const float* probabilities) {
  Floats8 finite = {};  // NaN if a value is not finite, else 0
  if (s.channels == 1) {
    float* unary = s.unary;
    for (int64_t y = 0; y < s.height; ++y, probabilities += 2 * s.width) {
      for (int64_t phase = 0; phase < s.step; ++phase) {
        for (int64_t cell = 0; cell < s.cells; cell += kGroup, unary += kGroup) {
          Floats8 p0 = broadcast<Floats8>(1.0f), p1 = p0;
          for (int i = 0; i < kGroup; ++i) {
            const int64_t x = (cell + i) * s.step + phase;
            if (x >= s.width) break;
            p0[i] = probabilities[2 * x];
            p1[i] = probabilities[2 * x + 1];
          }
          finite += p0 * 0.0f + p1 * 0.0f;
          store(unary, 0.5f * (log2(clipped(p1)) - log2(clipped(p0))));
        }
      }
    }
  } else {
    const int64_t n = s.height * s.width * s.labels, whole = n / kGroup * kGroup;
    for (int64_t i = 0; i < whole; i += kGroup) {
      const Floats8 p = load<Floats8>(probabilities + i);
      finite += p * 0.0f;
      store(s.out + i, log2(clipped(p)));
    }
    const Floats8 p = load_first(probabilities + whole, n - whole);
    finite += p * 0.0f;
    store_first(s.out + whole, log2(clipped(p)), n - whole);
  }
  float sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += finite[i];
  return sum == 0;
}

// Converts half the log-odds of two labels to the difference of their marginals, a tanh.
void tanh_line(float* line, int64_t n) {
  for_each_vector(n, [&](auto half, int64_t i) {
    half = load<decltype(half)>(line + i);
    const auto ratio = power_of_two(-2.0f * larger(half, -half)), likely = (1.0f - ratio) / (1.0f + ratio);
    store(line + i, select(half > 0.0f, likely, -likely));
  });
}

// Converts half the log-odds to both marginals, in out. Small values keep their relative precision.
void write_line(CrfSystem s, int64_t y, int64_t phase, const float* line) {
  for (int64_t cell = 0; cell < s.cells; cell += kGroup) {
    const Floats8 half = load<Floats8>(line + cell), e = power_of_two(-2.0f * larger(half, -half));
    const Floats8 likely = 1.0f / (1.0f + e), other = e * likely;
    const Floats8 first = select(half > 0.0f, other, likely), second = select(half > 0.0f, likely, other);
    for (int i = 0; i < kGroup; ++i) {
      const int64_t x = (cell + i) * s.step + phase;
      if (x >= s.width) break;
      s.out[2 * (y * s.width + x)] = first[i];
      s.out[2 * (y * s.width + x) + 1] = second[i];
    }
  }
}

// One pass over the pixels: computes new marginals from the messages of both terms (kSlice) and the unary, and adds
// them to the next lattice and grid (kSplat) or writes them to out.
template <bool kSlice, bool kSplat>
void update_one(CrfSystem s) {
  const int64_t padded = s.grid_width + kTaps - 1;
  float *const row = s.rows, *const values = s.rows + padded;
  const int32_t* corners = s.corners;
  const float *weights = s.weights, *unary = s.unary;
  if (kSplat) {
    fill(values, 0.0f, s.step * padded);
    fill(s.next_lattice, 0.0f, kSums * (s.vertices + 1));
    fill(s.next_grid, 0.0f, s.grid_height * s.grid_width);
  }
  for (int64_t y = 0; y < s.height; ++y) {
    if (kSlice) read_row(s, y, row);
    for (int64_t phase = 0; phase < s.step; ++phase) {
      const float *const taps = s.taps + phase * kTaps, *const norms = s.column_norm + phase * s.cells;
      float* const line = values + phase * padded + kTaps - 1;
      for (int64_t cell = 0; cell < s.cells; cell += kGroup) {
        Floats8 half = load<Floats8>(unary + cell);  // half the log-odds
        if (kSlice) {
          Floats8 spatial = load<Floats8>(row + cell) * taps[0];
#pragma GCC unroll 3
          for (int t = 1; t < kTaps; ++t)
            spatial = fma(load<Floats8>(row + cell + t), broadcast<Floats8>(taps[t]), spatial);
          half = fma(spatial, load<Floats8>(norms + cell), half);
          half += slice(s.lattice, corners + cell * kCorners, weights + cell * kCorners);
        }
        store(line + cell, half);
      }
      if (kSplat) {
        tanh_line(line, s.cells);
        splat_line(s.next_lattice, corners, weights, line, s.cells);
        for (int64_t cell = 0; cell < s.cells; cell += kGroup)
          store(line + cell, load<Floats8>(line + cell) * load<Floats8>(norms + cell));
      } else {
        write_line(s, y, phase, line);
      }
      unary += s.cells;
      corners += s.cells * kCorners;
      weights += s.cells * kCorners;
    }
    if (kSplat) add_row(s, y, values, padded);
  }
}

// f(sum, v), where a vector of 16 lanes is first halved.
template <class V, class F>
inline Floats8 joined(Floats8 sum, V v, F f) {
  if constexpr (sizeof(V) == sizeof(Floats8)) {
    return f(sum, v);
  } else {
    const Floats8 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    return f(sum, f(low, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)));
  }
}

// Lane i: f over all lanes of v[i], in the order of reduce_lanes.
template <class F>
inline Floats8 reduce_each(const Floats8 (&v)[kGroup], F f) {
  Floats8 halves[4], quarters[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    halves[i] = f(__builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11),
                  __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    quarters[i] = f(__builtin_shufflevector(halves[2 * i], halves[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13),
                    __builtin_shufflevector(halves[2 * i], halves[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15));
  }
  return f(__builtin_shufflevector(quarters[0], quarters[1], 0, 2, 8, 10, 4, 6, 12, 14),
           __builtin_shufflevector(quarters[0], quarters[1], 1, 3, 9, 11, 5, 7, 13, 15));
}

// The unary of n labels; lanes beyond them never win.
template <class V>
inline V load_labels(const float* p, int64_t n) {
#if defined(__AVX512VL__)
  const uint32_t inside = n < kLanesOf<V> ? (1u << n) - 1 : ~0u;
  if constexpr (sizeof(V) == sizeof(Floats8)) {
    return _mm256_mask_loadu_ps(broadcast<V>(-1e30f), static_cast<__mmask8>(inside), p);
  } else {
    return _mm512_mask_loadu_ps(broadcast<V>(-1e30f), static_cast<__mmask16>(inside), p);
  }
#else
  return select(first_lanes(n), load_first(p, n), broadcast<Floats8>(-1e30f));
#endif
}

// Pixels of one row and phase, and what they read.
struct Group {
  float* pixel;         // the first one's unary or marginals, [labels]; the next is step * labels further
  int64_t pixels;       // inside the image
  float* row;           // of the grid, [items, channels]
  int64_t items, cell;  // the first pixel's first node is `cell`
  const float *taps, *norms;
  const int32_t* corners;
  const float* weights;
};

// Adds the messages of a group to its unary: s.scores [kGroup, channels], unnormalized log2 marginals. Returns the
// largest score of each pixel.
template <bool kSlice>
inline __attribute__((always_inline)) Floats8 score(const CrfSystem& s, int64_t channels, const Group& group) {
  // Copies, which stores cannot alias.
  const int32_t* const corners = group.corners;
  const float *const weights = group.weights, *const norms = group.norms, *const taps = group.taps;
  const int64_t labels = s.labels, stride = s.step * labels;
  const float* pixels[kGroup];  // lanes beyond the image repeat its last pixel, with weights of 0
  Floats8 best[kGroup];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    pixels[i] = group.pixel + (i < group.pixels ? i : group.pixels - 1) * stride;
    best[i] = broadcast<Floats8>(-1e30f);
  }
  for_each_block(channels, [&](auto zero, int64_t c) __attribute__((always_inline)) {
    using B = decltype(zero);
    typedef typename B::Longest Longest;
    const Planes<B> at_node(group.row, c, group.items), at_vertex(s.lattice, c, s.vertices + 1),
        at_score(s.scores, c, kGroup);
    B nodes[kTaps];
    Longest tap[kTaps];
    if (kSlice) {
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) tap[t] = broadcast<Longest>(taps[t]);
#pragma GCC unroll 3
      for (int t = 0; t < kTaps - 1; ++t) nodes[t] = at_node.load(group.cell + t);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      B sum;
      sum.replace([&](auto v, int channel) {
        using V = decltype(v);
        const float* const from = pixels[i] + c + channel;
        return c + channel + kLanesOf<V> < channels ? load<V>(from) : load_labels<V>(from, labels - c - channel);
      });
      if (kSlice) {
        nodes[(i + kTaps - 1) % kTaps] = at_node.load(group.cell + i + kTaps - 1);
        B spatial = nodes[i % kTaps], bilateral = {};
        spatial.replace([&](auto v, int) { return v * first_lanes_of<decltype(v)>(tap[0]); });
#pragma GCC unroll 3
        for (int t = 1; t < kTaps; ++t) {
          spatial.replace([&](auto v, int, auto node) { return fma(node, first_lanes_of<decltype(v)>(tap[t]), v); },
                          nodes[(i + t) % kTaps]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kCorners; ++r) {
          const Longest weight = broadcast<Longest>(weights[r * kGroup + i]);
          bilateral.replace(
              [&](auto v, int, auto vertex) { return fma(vertex, first_lanes_of<decltype(v)>(weight), v); },
              at_vertex.load(corners[r * kGroup + i]));
        }
        const Longest norm = broadcast<Longest>(norms[i]);
        sum.replace(
            [&](auto v, int, auto near, auto far) { return v + fma(near, first_lanes_of<decltype(v)>(norm), far); },
            spatial, bilateral);
      }
      at_score.store(i, sum);
      sum.replace([&](auto v, int) {
        best[i] = joined(best[i], v, [](Floats8 a, Floats8 b) { return larger(a, b); });
        return v;
      });
    }
  });
  return reduce_each(best, [](Floats8 a, Floats8 b) { return larger(a, b); });
}

// Replaces scores by 2^(score - largest). Returns 1 / their sum for each pixel.
inline __attribute__((always_inline)) Floats8 exponentials(float* scores, int64_t channels, Floats8 largest) {
  const auto plus = [](Floats8 a, Floats8 b) { return a + b; };
  float top[kGroup];
  store(top, largest);
  Floats8 sums[kGroup] = {};
  for_each_vector(channels, [&](auto zero, int64_t c) {
    using V = decltype(zero);
    const Place of_score = place(c, channels, kGroup);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      float* const score = scores + of_score.begin + i * of_score.stride;
      V v = load<V>(score) - broadcast<V>(top[i]);
      // Negligible values become 0: their products would be denormal numbers, which are slow.
      v = select(v > -72.0f, power_of_two(v), V{});
      store(score, v);
      sums[i] = joined(sums[i], v, plus);
    }
  });
  return 1.0f / reduce_each(sums, plus);
}

// Adds marginals, scores times scale, to their vertices, and writes them times their norms to line.
inline __attribute__((always_inline)) void splat(const CrfSystem& s, int64_t channels, const Group& group,
                                                 const float* scale, float* line, int64_t items) {
  // Copies, which stores cannot alias.
  const int32_t* const corners = group.corners;
  const float *const weights = group.weights, *const norms = group.norms;
  const int64_t cell = group.cell + kTaps - 1;
  for_each_block(channels, [&](auto zero, int64_t c) __attribute__((always_inline)) {
    using B = decltype(zero);
    typedef typename B::Longest Longest;
    const Planes<B> at_cell(line, c, items), at_vertex(s.next_lattice, c, s.vertices + 1),
        at_score(s.scores, c, kGroup);
    for (int i = 0; i < kGroup; ++i) {
      const Longest factor = broadcast<Longest>(scale[i]), norm = broadcast<Longest>(norms[i]);
      B marginals = at_score.load(i), normalized;
      marginals.replace([&](auto v, int) { return v * first_lanes_of<decltype(v)>(factor); });
      normalized.replace([&](auto v, int, auto marginal) { return marginal * first_lanes_of<decltype(v)>(norm); },
                         marginals);
      at_cell.store(cell + i, normalized);
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        const int64_t vertex = corners[r * kGroup + i];
        const Longest weight = broadcast<Longest>(weights[r * kGroup + i]);
        B sum = at_vertex.load(vertex);
        sum.replace([&](auto v, int, auto marginal) { return fma(marginal, first_lanes_of<decltype(v)>(weight), v); },
                    marginals);
        at_vertex.store(vertex, sum);
      }
    }
  });
}

// Writes marginals, scores times scale.
inline void write_marginals(const CrfSystem& s, int64_t channels, const Group& group, const float* scale) {
  float* pixel = group.pixel;
  for (int64_t i = 0; i < group.pixels; ++i, pixel += s.step * s.labels) {
    const Floats8 factor = broadcast<Floats8>(scale[i]);
    for (int64_t c = 0; c < channels; c += kGroup) {
      const Place of_score = place(c, channels, kGroup);
      const Floats8 v = load<Floats8>(s.scores + of_score.begin + i * of_score.stride) * factor;
      if (c + kGroup < channels) {
        store(pixel + c, v);
      } else {
        store_first(pixel + c, v, s.labels - c);
      }
    }
  }
}

// Rows of a tile that have the same nodes of the grid.
struct Rows {
  int64_t y, count;
  int64_t first, cells;    // of the tile
  const int32_t* corners;  // of the first group
  const float* weights;
};

// Updates the pixels of some rows. values [count, step, cells between kTaps - 1 and kTaps + 1 zeros, channels]:
// scratch.
template <bool kSlice, bool kSplat>
inline __attribute__((always_inline)) void update_rows(const CrfSystem& s, int64_t channels, const Rows& rows,
                                                       float* values) {
  constexpr int64_t kLine = 16;  // floats
  const int64_t nodes = rows.cells + kTaps, items = nodes + kTaps, stride = s.step * s.labels;
  float *const nodes_of_rows = s.rows, *const sums = nodes_of_rows + kRowsAtOnce * nodes * channels;
  if (kSlice) read_rows(s, channels, rows.y, rows.count, rows.first, nodes_of_rows, nodes);
  Group group;
  group.items = nodes;
  group.corners = rows.corners;
  group.weights = rows.weights;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* const row = s.out + ((rows.y + r) * s.width + rows.first * s.step) * s.labels;
    const float* below = row + s.width * s.labels;
    group.row = nodes_of_rows + r * nodes * channels;
    for (int64_t phase = 0; phase < s.step; ++phase) {
      const int64_t inside = (s.width - phase + s.step - 1) / s.step - rows.first;  // cells of this phase in the image
      group.pixel = row + phase * s.labels;
      group.taps = s.taps + phase * kTaps;
      for (group.cell = 0; group.cell < rows.cells; group.cell += kGroup) {
        group.pixels = inside - group.cell < kGroup ? inside - group.cell : kGroup;
        group.norms = s.column_norm + phase * s.cells + rows.first + group.cell;
        // The hardware does not follow from row to row. All groups together fetch the tile's next row into L2.
        for (int64_t i = 0; i < kGroup * s.labels; i += kLine) __builtin_prefetch(below + i, 0, 2);
        below += kGroup * s.labels;
        const Floats8 largest = score<kSlice>(s, channels, group);
        float scale[kGroup];
        store(scale, exponentials(s.scores, channels, largest));
        if (kSplat) {
          splat(s, channels, group, scale, values + (r * s.step + phase) * items * channels, items);
        } else {
          write_marginals(s, channels, group, scale);
        }
        group.pixel += kGroup * stride;
        group.corners += kCorners * kGroup;
        group.weights += kCorners * kGroup;
      }
    }
  }
  if (kSplat) {
    for (int64_t r = 0; r < rows.count; ++r) {
      add_cells(s, channels, values + r * s.step * items * channels, items, sums + r * nodes * channels);
    }
    add_rows(s, channels, rows.y, rows.count, rows.first, sums, nodes);
  }
}

// kChannels: the number of channels at compile time, or 0 for any. The system is a copy, which stores cannot alias.
template <bool kSlice, bool kSplat, int kChannels>
void update_many(CrfSystem s) {
  const int64_t channels = kChannels > 0 ? kChannels : s.channels;
  const int64_t line = s.grid_width * channels, band = kBandNodes * s.step;
  float* const columns = s.columns;
  int64_t blurred = 0;  // rows of the next grid
  if (kSplat) {
    fill(s.next_lattice, 0.0f, (s.vertices + 1) * channels);
    fill(columns, 0.0f, kBlurRows * (s.grid_width + 2 * s.radius) * channels);
    for (int t = 0; t < kTaps - 1; ++t) fill(ring_row(s, channels, t), 0.0f, line);
  }
  Rows rows = {};
  rows.corners = s.corners;
  rows.weights = s.weights;
  int64_t zeroed = 0;  // for tiles of so many cells
  for (int64_t top = 0; top < s.height; top += band) {
    const int64_t bottom = top + band < s.height ? top + band : s.height, node = (bottom - 1) / s.step;
    if (kSplat) {
      for (int64_t n = top / s.step; n <= node; ++n) fill(ring_row(s, channels, n + kTaps - 1), 0.0f, line);
    }
    for (rows.first = 0; rows.first < s.cells; rows.first += s.tile) {
      rows.cells = s.cells - rows.first < s.tile ? s.cells - rows.first : s.tile;
      float* const values = s.rows + 2 * kRowsAtOnce * (rows.cells + kTaps) * channels;
      if (kSplat && rows.cells != zeroed) {
        fill(values, 0.0f, kRowsAtOnce * s.step * (rows.cells + 2 * kTaps) * channels);
        zeroed = rows.cells;
      }
      for (rows.y = top; rows.y < bottom; rows.y += rows.count) {
        const int64_t next_node = (rows.y / s.step + 1) * s.step, end = next_node < bottom ? next_node : bottom;
        rows.count = end - rows.y < kRowsAtOnce ? end - rows.y : kRowsAtOnce;
        update_rows<kSlice, kSplat>(s, channels, rows, values);
        const int64_t pixels = rows.count * s.step * rows.cells;
        rows.corners += pixels * kCorners;
        rows.weights += pixels * kCorners;
      }
    }
    if (kSplat) {
      // Rows up to `node` of the next grid are complete, and the same rows of this grid are not read any more.
      for (; bottom < s.height && blurred + kBlurRows + s.radius <= node + 1; blurred += kBlurRows) {
        blur_rows(s, channels, blurred, kBlurRows, columns);
      }
    }
  }
  if (kSplat) {
    for (int64_t count; blurred < s.grid_height; blurred += count) {
      count = s.grid_height - blurred < kBlurRows ? s.grid_height - blurred : kBlurRows;
      blur_rows(s, channels, blurred, count, columns);
    }
  }
}

template <bool kSlice, bool kSplat>
void update(const CrfSystem& s) {
  switch (s.channels) {
    case 1: return update_one<kSlice, kSplat>(s);
    case kGroup: return update_many<kSlice, kSplat, kGroup>(s);
    case 3 * kGroup: return update_many<kSlice, kSplat, 3 * kGroup>(s);  // VOC's 21 labels, Cityscapes' 19
    default: return update_many<kSlice, kSplat, 0>(s);
  }
}

void infer(CrfSystem s, int64_t iterations) {
  if (iterations == 0) return update<false, false>(s);
  update<false, true>(s);
  for (int64_t i = 1; i <= iterations; ++i) {
    const auto blur = s.channels == 1 ? blur_one : blur_many;
    blur(s, s.next_lattice, s.lattice, s.bilateral_weight);
    swap(s.lattice, s.next_lattice);
    if (s.channels == 1) blur_grid(s, s.next_grid, s.grid);
    i < iterations ? update<true, true>(s) : update<true, false>(s);
  }
}

constexpr CrfKernels kKernels = {embed, normalize, start, infer};

}  // namespace
}  // namespace namedmask::cpu
