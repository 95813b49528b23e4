// SPDX-License-Identifier: MIT
// dense_crf's inner loops, included by one file per instruction level; level.h says what is allowed here.
#include "dense_crf_levels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

constexpr int kLanes = CrfSystem::kLanes, kAxes = CrfSystem::kAxes, kCorners = CrfSystem::kCorners;
constexpr int kTaps = CrfSystem::kTaps, kSums = CrfSystem::kSums;
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));

#if defined(__AVX512F__)
typedef float Wide __attribute__((vector_size(64)));
#else
typedef F8 Wide;
#endif
template <class V>
using Ints = decltype(V{} < V{});

template <class V = F8>
inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class V = F8>
inline V broadcast(float a) {
  return a - V{};
}
template <class V>
inline Ints<V> bits(V v) {
  return reinterpret_cast<Ints<V>>(v);
}
template <class V>
inline V select(Ints<V> mask, V a, V b) {
  return mask ? a : b;
}
inline I8 first_lanes(int64_t n) { return I8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n); }

// Calls f(V, i) for i from 0 on, n floats in all, a multiple of kLanes, as many at a time as V has lanes.
template <class F>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  if constexpr (sizeof(Wide) > sizeof(F8)) {
    constexpr int64_t kWide = sizeof(Wide) / sizeof(float);
    for (; i + kWide <= n; i += kWide) f(Wide{}, i);
  }
  for (; i < n; i += kLanes) f(F8{}, i);
}

inline F8 gather(const float* values, const int32_t* index) {
  return F8{values[index[0]], values[index[1]], values[index[2]], values[index[3]],
            values[index[4]], values[index[5]], values[index[6]], values[index[7]]};
}

#if defined(__AVX2__)
inline F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
inline F8 larger(F8 a, F8 b) { return _mm256_max_ps(a, b); }
inline F8 smaller(F8 a, F8 b) { return _mm256_min_ps(a, b); }
#if defined(__AVX512F__)
inline Wide fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
// With a mask of ones, since GCC 12 takes the plain form's undefined source for a mistake of ours.
inline Wide larger(Wide a, Wide b) { return _mm512_maskz_max_ps(0xffff, a, b); }
#endif
inline F8 load_first(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first_lanes(n)));
}
inline void store_first(float* p, F8 v, int64_t n) {
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), v);
}
#else
inline F8 fma(F8 a, F8 b, F8 c) { return a * b + c; }
inline F8 larger(F8 a, F8 b) { return select(a > b, a, b); }
inline F8 smaller(F8 a, F8 b) { return select(a < b, a, b); }
inline F8 load_first(const float* p, int64_t n) {
  F8 v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, F8 v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

inline F8 root(F8 v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

template <class V>
inline V nearest(V v) {  // whole number, |v| < 2^22
  constexpr float kRound = 3 << 22;
  return (v + kRound) - kRound;
}

// e^x within 2e-7 of itself, for x from -87 on (what is less counts as that) to 88.
template <class V>
inline V exponential(V x) {
  x = larger(x, broadcast<V>(-87.0f));
  const V n = nearest(x * 1.44269504f);
  // ln 2 in two parts, the first with few enough bits that n times it is exact
  const V r = fma(n, broadcast<V>(-1.42860677e-6f), fma(n, broadcast<V>(-0.693145752f), x));
  V sum = fma(r, broadcast<V>(1.0f / 720), broadcast<V>(1.0f / 120));  // Taylor: |r| < 0.35
  sum = fma(r, sum, broadcast<V>(1.0f / 24));
  sum = fma(r, sum, broadcast<V>(1.0f / 6));
  sum = fma(r, sum, broadcast<V>(0.5f));
  sum = fma(r, sum, broadcast<V>(1.0f));
  sum = fma(r, sum, broadcast<V>(1.0f));
  return reinterpret_cast<V>(bits(sum) + (__builtin_convertvector(n, Ints<V>) << 23));
}

// log(x) of positive normal numbers.
inline F8 logarithm(F8 x) {
  const I8 exponent = (bits(x) - 0x3f3504f3) >> 23;  // so that the rest is from sqrt(1/2) to sqrt(2)
  const F8 m = reinterpret_cast<F8>(bits(x) - (exponent << 23)), n = __builtin_convertvector(exponent, F8);
  const F8 s = (m - 1.0f) / (m + 1.0f), square = s * s;  // log(m) = 2 atanh(s), |s| < 0.18
  F8 sum = fma(square, broadcast(2.0f / 9), broadcast(2.0f / 7));
  sum = fma(square, sum, broadcast(2.0f / 5));
  sum = fma(square, sum, broadcast(2.0f / 3));
  return fma(n, broadcast(0.693147181f), fma(s * square, sum, 2.0f * s));
}

inline F8 clipped(F8 p) { return smaller(larger(p, broadcast(1e-5f)), broadcast(1.0f)); }

inline void fill(float* p, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

inline void swap(float*& a, float*& b) {
  float* const was = a;
  a = b;
  b = was;
}

// -- the permutohedral lattice --

// Sections 3.1 and 3.2 of Adams et al.: into the plane where coordinates sum to 0, to the nearest remainder-0 point,
// and by the order of the differences to it the simplex around the pixel.
void embed(const float* features, CrfSimplices* simplices, float* weights) {
  F8 elevated[kCorners], sum = {};
  for (int i = kAxes; i > 0; --i) {
    const F8 f = load(features + (i - 1) * kLanes);
    elevated[i] = sum - static_cast<float>(i) * f;
    sum += f;
  }
  elevated[0] = sum;

  F8 nearest_point[kCorners], difference[kCorners], total = {};
  for (int i = 0; i < kCorners; ++i) {
    nearest_point[i] = nearest(elevated[i] * (1.0f / kCorners));
    difference[i] = elevated[i] - static_cast<float>(kCorners) * nearest_point[i];
    total += nearest_point[i];
  }
  I8 rank[kCorners];  // 0: the greatest difference
  for (I8& r : rank) r = __builtin_convertvector(total, I8);
  for (int i = 0; i < kCorners; ++i) {
    for (int j = i + 1; j < kCorners; ++j) {
      const I8 less = difference[i] < difference[j];  // -1 where true
      rank[i] -= less;
      rank[j] += 1 + less;
    }
  }
  F8 sorted[kCorners];
  I8 order = {}, point[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    // The rounded coordinates may sum to other than 0: those that were rounded farthest take a step back.
    const I8 up = rank[i]<0, down = rank[i]> kAxes;
    const I8 back = down - up;  // +1, -1 or 0
    rank[i] += kCorners * back;
    const F8 moved = __builtin_convertvector(back, F8);
    sorted[i] = difference[i] * (1.0f / kCorners) - moved;
    point[i] = __builtin_convertvector(nearest_point[i], I8) + back;
    order |= i << (3 * (kAxes - rank[i]));
  }
  // Greatest first.
  constexpr int kExchanges[][2] = {{0, 5}, {1, 3}, {2, 4}, {1, 2}, {3, 4}, {0, 3},
                                   {2, 5}, {0, 1}, {2, 3}, {4, 5}, {1, 2}, {3, 4}};
  for (const auto& [a, b] : kExchanges) {
    const F8 high = larger(sorted[a], sorted[b]);
    sorted[b] = smaller(sorted[a], sorted[b]);
    sorted[a] = high;
  }
  store(weights, 1.0f + sorted[kAxes] - sorted[0]);
  for (int r = 1; r < kCorners; ++r) store(weights + r * kLanes, sorted[kCorners - 1 - r] - sorted[kCorners - r]);

  constexpr int32_t kBias = 1 << 11;
  const auto put = [](int32_t* to, I8 v) { __builtin_memcpy(to, &v, sizeof(v)); };
  put(simplices->low, (point[0] + kBias) + ((point[1] + kBias) << 12));
  put(simplices->middle, (point[2] + kBias) + ((point[3] + kBias) << 12));
  put(simplices->high, point[4] + kBias);
  put(simplices->order, order);
}

// Adds the pixels of `cells` lanes, each times its weights, to their vertices.
void splat_line(float* lattice, const int32_t* corners, const float* weights, const float* line, int64_t cells) {
  for (int64_t cell = 0; cell < cells; cell += kLanes, corners += kCorners * kLanes, weights += kCorners * kLanes) {
    float products[kCorners * kLanes];
    for (int r = 0; r < kCorners; ++r) store(products + r * kLanes, load(weights + r * kLanes) * load(line + cell));
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        lattice[kSums * static_cast<int64_t>(corners[r * kLanes + i]) + i % kSums] += products[r * kLanes + i];
      }
    }
  }
}

inline F8 slice(const float* lattice, const int32_t* corners, const float* weights) {
  F8 sum = {};
#pragma GCC unroll 6
  for (int r = 0; r < kCorners; ++r) {
    sum = fma(load(weights + r * kLanes), gather(lattice, corners + r * kLanes), sum);
  }
  return sum;
}

// Calls f(from, to, near, scale) for the six directions: from lattice to scratch, back, and so on. An even number of
// them: the result ends in `lattice`.
template <class F>
inline void for_each_direction(CrfSystem s, float* lattice, float* scratch, float scale, F f) {
  for (int j = 0; j < kCorners; j += 2) {
    f(lattice, scratch, s.neighbors + 2 * j * s.vertices, 1.0f);
    f(scratch, lattice, s.neighbors + 2 * (j + 1) * s.vertices, j + 2 == kCorners ? scale : 1.0f);
  }
}

// Every vertex plus half of its two neighbors, direction after direction; the result times `scale`.
void blur_one(CrfSystem s, float* lattice, float* scratch, float scale) {
  for (int64_t i = 0; i <= s.vertices; ++i) lattice[i] = lattice[kSums * i] + lattice[kSums * i + 1];
  for_each_direction(s, lattice, scratch, scale, [&](const float* from, float* to, const int32_t* near, float own) {
    const int64_t whole = s.vertices / kLanes * kLanes;
    const float other = 0.5f * own;
    for (int64_t i = 0; i < whole; i += kLanes, near += 2 * kLanes) {
      F8 around;
      for (int lane = 0; lane < kLanes; ++lane) around[lane] = from[near[2 * lane]] + from[near[2 * lane + 1]];
      store(to + i, fma(around, broadcast(other), load(from + i) * own));
    }
    for (int64_t i = whole; i < s.vertices; ++i, near += 2) {
      to[i] = fma(broadcast(from[near[0]] + from[near[1]]), broadcast(other), broadcast(from[i] * own))[0];
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
  const int64_t blocks = s.height * s.step * s.cells / kLanes;
  constexpr int64_t kBlock = kCorners * kLanes;
  fill(s.lattice, 0.0f, kSums * (s.vertices + 1));
  fill(s.rows, 1.0f, s.cells);
  for (int64_t b = 0; b < blocks; b += s.cells / kLanes) {
    splat_line(s.lattice, s.corners + b * kBlock, s.weights + b * kBlock, s.rows, s.cells);
  }
  blur_one(s, s.lattice, s.next_lattice, 1.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    float* const weights = s.weights + b * kBlock;
    const F8 norm = 1.0f / root(slice(s.lattice, s.corners + b * kBlock, weights) + 1e-20f);
    for (int r = 0; r < kCorners; ++r) {
      // Lanes beyond the photo have weights of 0, and must keep them.
      store(weights + r * kLanes, load(weights + r * kLanes) * norm);
    }
  }
}

// -- the spatial grid --

// out[i] = sum over t from -before to after of gauss[|t|] * in[i + t * stride], i < n, a multiple of kLanes.
inline void convolve(const float* in, int64_t stride, const float* gauss, int64_t before, int64_t after, float* out,
                     int64_t n) {
  constexpr int kTurns = 4, kStep = sizeof(Wide) / sizeof(float);  // sums that do not wait for each other
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

// The Gaussian on the nodes: columns into a line, and that along itself.
void blur_grid(CrfSystem s, const float* from, float* to) {
  const int64_t line = s.grid_width * s.channels, pad = s.radius * s.channels;
  fill(s.rows, 0.0f, line + 2 * pad);
  for (int64_t y = 0; y < s.grid_height; ++y) {
    const int64_t before = y < s.radius ? y : s.radius, left = s.grid_height - 1 - y;
    convolve(from + y * line, line, s.gauss, before, left < s.radius ? left : s.radius, s.rows + pad, line);
    convolve(s.rows + pad, s.channels, s.gauss, s.radius, s.radius, to + y * line, line);
  }
}

// row = the grid's values on row y of the photo, between the nodes' rows.
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

// Adds row y to the next grid. values [step, line_values]: what the pixels of each phase add, after kTaps - 1 nodes of
// zeros.
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
  F8 finite = {};  // stays 0 unless a value is not finite
  if (s.channels == 1) {
    float* unary = s.unary;
    for (int64_t y = 0; y < s.height; ++y, probabilities += 2 * s.width) {
      for (int64_t phase = 0; phase < s.step; ++phase) {
        for (int64_t cell = 0; cell < s.cells; cell += kLanes, unary += kLanes) {
          F8 p0 = broadcast(1.0f), p1 = p0;
          for (int i = 0; i < kLanes; ++i) {
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
    const int64_t n = s.height * s.width * s.labels, whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const F8 p = load(probabilities + i);
      finite += p * 0.0f;
      store(s.out + i, logarithm(clipped(p)));
    }
    const F8 p = load_first(probabilities + whole, n - whole);
    finite += p * 0.0f;
    store_first(s.out + whole, logarithm(clipped(p)), n - whole);
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += finite[i];
  return sum == 0;
}

// From half the log-odds of two labels to the difference of their marginals, a tanh.
void tanh_line(float* line, int64_t n) {
  for_each_vector(n, [&](auto half, int64_t i) {
    using V = decltype(half);
    half = load<V>(line + i);
    // e^2x runs over from 44 on, where tanh is 1 long since
    store(line + i, 1.0f - 2.0f / (1.0f + exponential(select(half < 40.0f, 2.0f * half, broadcast<V>(80.0f)))));
  });
}

// From half the log-odds to both marginals, in out; each with its own small values exact.
void write_line(CrfSystem s, int64_t y, int64_t phase, const float* line) {
  for (int64_t cell = 0; cell < s.cells; cell += kLanes) {
    const F8 half = load(line + cell), e = exponential(-2.0f * larger(half, -half));
    const F8 likely = 1.0f / (1.0f + e), other = e * likely;
    const F8 first = select(half > 0.0f, other, likely), second = select(half > 0.0f, likely, other);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t x = (cell + i) * s.step + phase;
      if (x >= s.width) break;
      s.out[2 * (y * s.width + x)] = first[i];
      s.out[2 * (y * s.width + x) + 1] = second[i];
    }
  }
}

// One walk over the pixels: the terms' messages (kSlice) and the unary make new marginals, which are added to the next
// lattice and grid (kSplat) or written out.
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
      for (int64_t cell = 0; cell < s.cells; cell += kLanes) {
        F8 half = load(unary + cell);  // of the log-odds
        if (kSlice) {
          F8 spatial = load(row + cell) * taps[0];
#pragma GCC unroll 3
          for (int t = 1; t < kTaps; ++t) spatial = fma(load(row + cell + t), broadcast(taps[t]), spatial);
          half = fma(spatial, load(norms + cell), half);
          half += slice(s.lattice, corners + cell * kCorners, weights + cell * kCorners);
        }
        store(line + cell, half);
      }
      if (kSplat) {
        tanh_line(line, s.cells);
        splat_line(s.next_lattice, corners, weights, line, s.cells);
        for (int64_t cell = 0; cell < s.cells; cell += kLanes)
          store(line + cell, load(line + cell) * load(norms + cell));
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

// f of all lanes, in all lanes.
template <class F>
inline F8 reduced(F8 v, F f) {
  v = f(v, F8{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]});
  v = f(v, F8{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]});
  return f(v, F8{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]});
}

// Adds the messages of up to kLanes pixels to their unary: scores [kLanes, channels], their log marginals but for what
// makes these sum to 1. The first pixel's unary is at `pixel`, the next `stride` on.
template <bool kSlice>
inline __attribute__((always_inline)) void score(const CrfSystem& s, int64_t channels, const float* pixel,
                                                 int64_t stride, int64_t pixels, const float* row, const float* taps,
                                                 const float* norms, const int32_t* corners, const float* weights) {
  const int64_t last = channels - kLanes, rest = s.labels - last;
  const F8 never = select(first_lanes(rest), F8{}, broadcast(-1e30f));  // for channels that are no label
  float* scores = s.scores;
  for (int64_t i = 0; i < pixels; ++i, pixel += stride, row += channels, scores += channels) {
    __builtin_prefetch(pixel + kLanes * stride);  // it lies too far off for the processor to guess
    __builtin_prefetch(pixel + kLanes * stride + last);
    const float* vertices[kCorners];
#pragma GCC unroll 6
    for (int r = 0; r < kCorners; ++r) vertices[r] = s.lattice + corners[r * kLanes + i] * channels;
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
          bilateral = fma(load<V>(vertices[r] + c), broadcast<V>(weights[r * kLanes + i]), bilateral);
        }
      }
      return fma(spatial, broadcast<V>(norms[i]), bilateral);
    };
    for_each_vector(last, [&](auto v, int64_t c) { store(scores + c, load<decltype(v)>(pixel + c) + messages(v, c)); });
    store(scores + last, load_first(pixel + last, rest) + never + messages(F8{}, last));
  }
}

// f of all lanes, in all lanes.
template <class F>
inline F8 folded(F8 v, F f) {
  v = f(v, F8{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]});
  v = f(v, F8{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]});
  return f(v, F8{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]});
}

// f of a sum so far and another vector, halved where it is wide.
template <class V, class F>
inline F8 joined(F8 sum, V v, F f) {
  if constexpr (sizeof(V) == sizeof(F8)) {
    return f(sum, v);
  } else {
    const F8 low = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
    return f(sum, f(low, F8{v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]}));
  }
}

// Scores to marginals, in place.
inline __attribute__((always_inline)) void softmax(float* scores, int64_t channels, int64_t pixels) {
  const auto greater = [](F8 a, F8 b) { return larger(a, b); };
  const auto plus = [](F8 a, F8 b) { return a + b; };
  for (int64_t i = 0; i < pixels; ++i, scores += channels) {
    F8 best = broadcast(-1e30f), sum = {};
    for_each_vector(channels, [&](auto v, int64_t c) { best = joined(best, load<decltype(v)>(scores + c), greater); });
    const float top = folded(best, greater)[0];
    for_each_vector(channels, [&](auto v, int64_t c) {
      v = load<decltype(v)>(scores + c) - top;
      // What is too little to count becomes 0: products of it would be denormal numbers, which are slow.
      v = select(v > -50.0f, exponential(v), decltype(v){});
      store(scores + c, v);
      sum = joined(sum, v, plus);
    });
    const float scale = 1.0f / folded(sum, plus)[0];
    for_each_vector(channels, [&](auto v, int64_t c) { store(scores + c, load<decltype(v)>(scores + c) * scale); });
  }
}

// Adds marginals to their vertices, and leaves them times their norms in line [pixels, channels].
inline __attribute__((always_inline)) void splat(const CrfSystem& s, int64_t channels, int64_t pixels,
                                                 const float* norms, const int32_t* corners, const float* weights,
                                                 float* line) {
  const float* marginals = s.scores;
  for (int64_t i = 0; i < pixels; ++i, marginals += channels, line += channels) {
    float* vertices[kCorners];
#pragma GCC unroll 6
    for (int r = 0; r < kCorners; ++r) vertices[r] = s.next_lattice + corners[r * kLanes + i] * channels;
    for_each_vector(channels, [&](auto v, int64_t c) {
      using V = decltype(v);
      v = load<V>(marginals + c);
      store(line + c, v * norms[i]);
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        store(vertices[r] + c, fma(v, broadcast<V>(weights[r * kLanes + i]), load<V>(vertices[r] + c)));
      }
    });
  }
}

// With the number of channels known to the compiler, or 0 for any. The system is a copy, which no store can change.
template <bool kSlice, bool kSplat, int kChannels>
void update_many(CrfSystem s) {
  const int64_t channels = kChannels > 0 ? kChannels : s.channels, last = channels - kLanes;
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
      const int64_t cells = (s.width - phase + s.step - 1) / s.step;  // of this phase within the photo
      for (int64_t cell = 0; cell < s.cells;
           cell += kLanes, corners += kCorners * kLanes, weights += kCorners * kLanes) {
        const int64_t pixels = cells - cell < kLanes ? cells - cell : kLanes, stride = s.step * s.labels;
        float* pixel = s.out + (y * s.width + cell * s.step + phase) * s.labels;
        score<kSlice>(s, channels, pixel, stride, pixels, row + cell * channels, taps, norms + cell, corners, weights);
        softmax(s.scores, channels, pixels);
        if (kSplat) {
          splat(s, channels, pixels, norms + cell, corners, weights, line + cell * channels);
        } else {
          const float* marginals = s.scores;
          for (int64_t i = 0; i < pixels; ++i, pixel += stride, marginals += channels) {
            for (int64_t c = 0; c < last; c += kLanes) store(pixel + c, load(marginals + c));
            store_first(pixel + last, load(marginals + last), s.labels - last);
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
    case kLanes: return update_many<kSlice, kSplat, kLanes>(s);
    case 3 * kLanes: return update_many<kSlice, kSplat, 3 * kLanes>(s);  // VOC's 21 labels, Cityscapes' 19
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
