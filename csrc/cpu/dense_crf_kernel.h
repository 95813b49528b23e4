// SPDX-License-Identifier: MIT
// dense_crf's inner loops, compiled once per instruction level; level.h describes the rules.
#include "dense_crf_levels.h"
#include "exponential.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

constexpr int kAxes = CrfSystem::kAxes, kCorners = CrfSystem::kCorners;
constexpr int kTaps = CrfSystem::kTaps, kSums = CrfSystem::kSums;
constexpr int kGroup = CrfSystem::kGroup;
typedef VectorOf<float, (kLanes > 8 ? kLanes : 8)>::Type Wide;

// e^x for x <= 88; below -87 and for NaN e^-87.
template <class V>
inline V exponential(V x) {
  return exponential<TaylorTerms>(larger(x, broadcast<V>(-87.0f)));
}

// log(x) for positive normal numbers.
inline Floats8 logarithm(Floats8 x) {
  const Ints8 exponent = (bits(x) - 0x3f3504f3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2)]
  const Floats8 m = reinterpret_cast<Floats8>(bits(x) - (exponent << 23)),
                n = __builtin_convertvector(exponent, Floats8);
  const Floats8 s = (m - 1.0f) / (m + 1.0f), square = s * s;  // log(m) = 2 atanh(s), |s| < 0.18
  Floats8 sum = fma(square, broadcast<Floats8>(2.0f / 9), broadcast<Floats8>(2.0f / 7));
  sum = fma(square, sum, broadcast<Floats8>(2.0f / 5));
  sum = fma(square, sum, broadcast<Floats8>(2.0f / 3));
  return fma(n, broadcast<Floats8>(0.693147181f), fma(s * square, sum, 2.0f * s));
}

inline Floats8 clipped(Floats8 p) { return smaller(larger(p, broadcast<Floats8>(1e-5f)), broadcast<Floats8>(1.0f)); }

inline void fill(float* p, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

inline void swap(float*& a, float*& b) {
  float* const was = a;
  a = b;
  b = was;
}

// -- the permutohedral lattice --

// Sections 3.1 and 3.2 of Adams et al.: maps the pixel into the plane where coordinates sum to 0 and finds the nearest
// remainder-0 point; the order of the differences gives the simplex around the pixel.
void embed(const float* features, CrfSimplices* simplices, float* weights) {
  Floats8 elevated[kCorners], sum = {};
  for (int i = kAxes; i > 0; --i) {
    const Floats8 f = load<Floats8>(features + (i - 1) * kGroup);
    elevated[i] = sum - static_cast<float>(i) * f;
    sum += f;
  }
  elevated[0] = sum;

  Floats8 nearest_point[kCorners], difference[kCorners], total = {};
  for (int i = 0; i < kCorners; ++i) {
    nearest_point[i] = nearest(elevated[i] * (1.0f / kCorners));
    difference[i] = elevated[i] - static_cast<float>(kCorners) * nearest_point[i];
    total += nearest_point[i];
  }
  Ints8 rank[kCorners];  // 0: the largest difference
  for (Ints8& r : rank) r = __builtin_convertvector(total, Ints8);
  for (int i = 0; i < kCorners; ++i) {
    for (int j = i + 1; j < kCorners; ++j) {
      const Ints8 less = difference[i] < difference[j];  // -1 where true
      rank[i] -= less;
      rank[j] += 1 + less;
    }
  }
  Floats8 sorted[kCorners];
  Ints8 order = {}, point[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    // The rounded coordinates may not sum to 0: those rounded farthest move back one step.
    const Ints8 up = rank[i]<0, down = rank[i]> kAxes;
    const Ints8 back = down - up;  // +1, -1 or 0
    rank[i] += kCorners * back;
    const Floats8 moved = __builtin_convertvector(back, Floats8);
    sorted[i] = difference[i] * (1.0f / kCorners) - moved;
    point[i] = __builtin_convertvector(nearest_point[i], Ints8) + back;
    order |= i << (3 * (kAxes - rank[i]));
  }
  // A sorting network, largest first.
  constexpr int kExchanges[][2] = {{0, 5}, {1, 3}, {2, 4}, {1, 2}, {3, 4}, {0, 3},
                                   {2, 5}, {0, 1}, {2, 3}, {4, 5}, {1, 2}, {3, 4}};
  for (const auto& [a, b] : kExchanges) {
    const Floats8 high = larger(sorted[a], sorted[b]);
    sorted[b] = smaller(sorted[a], sorted[b]);
    sorted[a] = high;
  }
  store(weights, 1.0f + sorted[kAxes] - sorted[0]);
  for (int r = 1; r < kCorners; ++r) store(weights + r * kGroup, sorted[kCorners - 1 - r] - sorted[kCorners - r]);

  constexpr int32_t kBias = 1 << 11;
  const auto put = [](int32_t* to, Ints8 v) { __builtin_memcpy(to, &v, sizeof(v)); };
  put(simplices->low, (point[0] + kBias) + ((point[1] + kBias) << 12));
  put(simplices->middle, (point[2] + kBias) + ((point[3] + kBias) << 12));
  put(simplices->high, point[4] + kBias);
  put(simplices->order, order);
}

// Adds `cells` lanes of pixels, each times its weights, to their vertices.
void splat_line(float* lattice, const int32_t* corners, const float* weights, const float* line, int64_t cells) {
  for (int64_t cell = 0; cell < cells; cell += kGroup, corners += kCorners * kGroup, weights += kCorners * kGroup) {
    float products[kCorners * kGroup];
    for (int r = 0; r < kCorners; ++r)
      store(products + r * kGroup, load<Floats8>(weights + r * kGroup) * load<Floats8>(line + cell));
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        lattice[kSums * static_cast<int64_t>(corners[r * kGroup + i]) + i % kSums] += products[r * kGroup + i];
      }
    }
  }
}

inline Floats8 slice(const float* lattice, const int32_t* corners, const float* weights) {
  Floats8 sum = {};
#pragma GCC unroll 6
  for (int r = 0; r < kCorners; ++r) {
    sum = fma(load<Floats8>(weights + r * kGroup), gather(lattice, corners + r * kGroup), sum);
  }
  return sum;
}

// Calls f(from, to, near, scale) for the six directions, alternating between lattice and scratch. Their number is even,
// so the result is in `lattice`.
template <class F>
inline void for_each_direction(CrfSystem s, float* lattice, float* scratch, float scale, F f) {
  for (int j = 0; j < kCorners; j += 2) {
    f(lattice, scratch, s.neighbors + 2 * j * s.vertices, 1.0f);
    f(scratch, lattice, s.neighbors + 2 * (j + 1) * s.vertices, j + 2 == kCorners ? scale : 1.0f);
  }
}

// Blurs the vertices direction by direction: each plus half of its two neighbors. The result is multiplied by `scale`.
void blur_one(CrfSystem s, float* lattice, float* scratch, float scale) {
  for (int64_t i = 0; i <= s.vertices; ++i) lattice[i] = lattice[kSums * i] + lattice[kSums * i + 1];
  for_each_direction(s, lattice, scratch, scale, [&](const float* from, float* to, const int32_t* near, float own) {
    const int64_t whole = s.vertices / kGroup * kGroup;
    const float other = 0.5f * own;
    for (int64_t i = 0; i < whole; i += kGroup, near += 2 * kGroup) {
      Floats8 around;
      for (int lane = 0; lane < kGroup; ++lane) around[lane] = from[near[2 * lane]] + from[near[2 * lane + 1]];
      store(to + i, fma(around, broadcast<Floats8>(other), load<Floats8>(from + i) * own));
    }
    for (int64_t i = whole; i < s.vertices; ++i, near += 2) {
      to[i] = fma(broadcast<Floats8>(from[near[0]] + from[near[1]]), broadcast<Floats8>(other),
                  broadcast<Floats8>(from[i] * own))[0];
    }
    to[s.vertices] = 0;
  });
}

void blur_many(CrfSystem s, float* lattice, float* scratch, float scale) {
  for_each_direction(s, lattice, scratch, scale, [&](const float* from, float* to, const int32_t* near, float own) {
    const float other = 0.5f * own;
    for (int64_t i = 0; i < s.vertices; ++i, near += 2, to += s.channels) {
      const float *center = from + i * s.channels, *a = from + near[0] * s.channels, *b = from + near[1] * s.channels;
      for_each_vector(s.channels, [&](auto v, int64_t c) {
        using V = decltype(v);
        store(to + c, fma(load<V>(a + c) + load<V>(b + c), broadcast<V>(other), load<V>(center + c) * own));
      });
    }
    fill(to, 0.0f, s.channels);
  });
}

void normalize(CrfSystem s) {
  const int64_t blocks = s.height * s.step * s.cells / kGroup;
  constexpr int64_t kBlock = kCorners * kGroup;
  fill(s.lattice, 0.0f, kSums * (s.vertices + 1));
  fill(s.rows, 1.0f, s.cells);
  for (int64_t b = 0; b < blocks; b += s.cells / kGroup) {
    splat_line(s.lattice, s.corners + b * kBlock, s.weights + b * kBlock, s.rows, s.cells);
  }
  blur_one(s, s.lattice, s.next_lattice, 1.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    float* const weights = s.weights + b * kBlock;
    const Floats8 norm = 1.0f / square_root(slice(s.lattice, s.corners + b * kBlock, weights) + 1e-20f);
    for (int r = 0; r < kCorners; ++r) {
      // Lanes beyond the image have weights of 0, and keep them.
      store(weights + r * kGroup, load<Floats8>(weights + r * kGroup) * norm);
    }
  }
}

// -- the spatial grid --

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

// Applies the Gaussian on the nodes: columns into one line, then along the line.
void blur_grid(CrfSystem s, const float* from, float* to) {
  const int64_t line = s.grid_width * s.channels, pad = s.radius * s.channels;
  fill(s.rows, 0.0f, line + 2 * pad);
  for (int64_t y = 0; y < s.grid_height; ++y) {
    const int64_t before = y < s.radius ? y : s.radius, left = s.grid_height - 1 - y;
    convolve(from + y * line, line, s.gauss, before, left < s.radius ? left : s.radius, s.rows + pad, line);
    convolve(s.rows + pad, s.channels, s.gauss, s.radius, s.radius, to + y * line, line);
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

// -- the mean field --

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
          store(unary, 0.5f * (logarithm(clipped(p1)) - logarithm(clipped(p0))));
        }
      }
    }
  } else {
    const int64_t n = s.height * s.width * s.labels, whole = n / kGroup * kGroup;
    for (int64_t i = 0; i < whole; i += kGroup) {
      const Floats8 p = load<Floats8>(probabilities + i);
      finite += p * 0.0f;
      store(s.out + i, logarithm(clipped(p)));
    }
    const Floats8 p = load_first(probabilities + whole, n - whole);
    finite += p * 0.0f;
    store_first(s.out + whole, logarithm(clipped(p)), n - whole);
  }
  float sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += finite[i];
  return sum == 0;
}

// Converts half the log-odds of two labels to the difference of their marginals, a tanh.
void tanh_line(float* line, int64_t n) {
  for_each_vector(n, [&](auto half, int64_t i) {
    using V = decltype(half);
    half = load<V>(line + i);
    // e^2x overflows from 44 on, where tanh is 1 in floats
    store(line + i, 1.0f - 2.0f / (1.0f + exponential(select(half < 40.0f, 2.0f * half, broadcast<V>(80.0f)))));
  });
}

// Converts half the log-odds to both marginals, in out. Small values keep their relative precision.
void write_line(CrfSystem s, int64_t y, int64_t phase, const float* line) {
  for (int64_t cell = 0; cell < s.cells; cell += kGroup) {
    const Floats8 half = load<Floats8>(line + cell), e = exponential(-2.0f * larger(half, -half));
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

// Adds the messages of up to kGroup pixels to their unary: scores [kGroup, channels], unnormalized log marginals. The
// first pixel's unary is at `pixel`, the next `stride` further.
template <bool kSlice>
inline __attribute__((always_inline)) void score(const CrfSystem& s, int64_t channels, const float* pixel,
                                                 int64_t stride, int64_t pixels, const float* row, const float* taps,
                                                 const float* norms, const int32_t* corners, const float* weights) {
  const int64_t last = channels - kGroup, rest = s.labels - last;
  const Floats8 never = select(first_lanes(rest), Floats8{}, broadcast<Floats8>(-1e30f));  // for padding channels
  float* scores = s.scores;
  for (int64_t i = 0; i < pixels; ++i, pixel += stride, row += channels, scores += channels) {
    __builtin_prefetch(pixel + kGroup * stride);  // too far away for the hardware prefetcher
    __builtin_prefetch(pixel + kGroup * stride + last);
    const float* vertices[kCorners];
#pragma GCC unroll 6
    for (int r = 0; r < kCorners; ++r) vertices[r] = s.lattice + corners[r * kGroup + i] * channels;
    const auto messages = [&](auto spatial, int64_t c) {
      using V = decltype(spatial);
      V bilateral = {};
      if (kSlice) {
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) {
          spatial = fma(load<V>(row + t * channels + c), broadcast<V>(taps[t]), spatial);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kCorners; ++r) {
          bilateral = fma(load<V>(vertices[r] + c), broadcast<V>(weights[r * kGroup + i]), bilateral);
        }
      }
      return fma(spatial, broadcast<V>(norms[i]), bilateral);
    };
    for_each_vector(last, [&](auto v, int64_t c) { store(scores + c, load<decltype(v)>(pixel + c) + messages(v, c)); });
    store(scores + last, load_first(pixel + last, rest) + never + messages(Floats8{}, last));
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

// Converts scores to marginals, in place.
inline __attribute__((always_inline)) void softmax(float* scores, int64_t channels, int64_t pixels) {
  const auto greater = [](Floats8 a, Floats8 b) { return larger(a, b); };
  const auto plus = [](Floats8 a, Floats8 b) { return a + b; };
  for (int64_t i = 0; i < pixels; ++i, scores += channels) {
    Floats8 best = broadcast<Floats8>(-1e30f), sum = {};
    for_each_vector(channels, [&](auto v, int64_t c) { best = joined(best, load<decltype(v)>(scores + c), greater); });
    const float top = largest_lane(best)[0];
    for_each_vector(channels, [&](auto v, int64_t c) {
      v = load<decltype(v)>(scores + c) - top;
      // Negligible values become 0: their products would be denormal numbers, which are slow.
      v = select(v > -50.0f, exponential(v), decltype(v){});
      store(scores + c, v);
      sum = joined(sum, v, plus);
    });
    const float scale = 1.0f / sum_of_lanes(sum);
    for_each_vector(channels, [&](auto v, int64_t c) { store(scores + c, load<decltype(v)>(scores + c) * scale); });
  }
}

// Adds marginals to their vertices, and writes them times their norms to line [pixels, channels].
inline __attribute__((always_inline)) void splat(const CrfSystem& s, int64_t channels, int64_t pixels,
                                                 const float* norms, const int32_t* corners, const float* weights,
                                                 float* line) {
  const float* marginals = s.scores;
  for (int64_t i = 0; i < pixels; ++i, marginals += channels, line += channels) {
    float* vertices[kCorners];
#pragma GCC unroll 6
    for (int r = 0; r < kCorners; ++r) vertices[r] = s.next_lattice + corners[r * kGroup + i] * channels;
    for_each_vector(channels, [&](auto v, int64_t c) {
      using V = decltype(v);
      v = load<V>(marginals + c);
      store(line + c, v * norms[i]);
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        store(vertices[r] + c, fma(v, broadcast<V>(weights[r * kGroup + i]), load<V>(vertices[r] + c)));
      }
    });
  }
}

// kChannels: the number of channels at compile time, or 0 for any. The system is a copy, which stores cannot alias.
template <bool kSlice, bool kSplat, int kChannels>
void update_many(CrfSystem s) {
  const int64_t channels = kChannels > 0 ? kChannels : s.channels, last = channels - kGroup;
  const int64_t padded = (s.grid_width + kTaps - 1) * channels;
  float *const row = s.rows, *const values = s.rows + padded;
  const int32_t* corners = s.corners;
  const float* weights = s.weights;
  if (kSplat) {
    fill(values, 0.0f, s.step * padded);
    fill(s.next_lattice, 0.0f, (s.vertices + 1) * channels);
    fill(s.next_grid, 0.0f, s.grid_height * s.grid_width * channels);
  }
  for (int64_t y = 0; y < s.height; ++y) {
    if (kSlice) read_row(s, y, row);
    for (int64_t phase = 0; phase < s.step; ++phase) {
      const float *const taps = s.taps + phase * kTaps, *const norms = s.column_norm + phase * s.cells;
      float* const line = values + phase * padded + (kTaps - 1) * channels;
      const int64_t cells = (s.width - phase + s.step - 1) / s.step;  // of this phase inside the image
      for (int64_t cell = 0; cell < s.cells;
           cell += kGroup, corners += kCorners * kGroup, weights += kCorners * kGroup) {
        const int64_t pixels = cells - cell < kGroup ? cells - cell : kGroup, stride = s.step * s.labels;
        float* pixel = s.out + (y * s.width + cell * s.step + phase) * s.labels;
        score<kSlice>(s, channels, pixel, stride, pixels, row + cell * channels, taps, norms + cell, corners, weights);
        softmax(s.scores, channels, pixels);
        if (kSplat) {
          splat(s, channels, pixels, norms + cell, corners, weights, line + cell * channels);
        } else {
          const float* marginals = s.scores;
          for (int64_t i = 0; i < pixels; ++i, pixel += stride, marginals += channels) {
            for (int64_t c = 0; c < last; c += kGroup) store(pixel + c, load<Floats8>(marginals + c));
            store_first(pixel + last, load<Floats8>(marginals + last), s.labels - last);
          }
        }
      }
    }
    if (kSplat) add_row(s, y, values, padded);
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
    blur_grid(s, s.next_grid, s.grid);
    i < iterations ? update<true, true>(s) : update<true, false>(s);
  }
}

constexpr CrfKernels kKernels = {embed, normalize, start, infer};

}  // namespace
}  // namespace namedmask::cpu
