// SPDX-License-Identifier: MIT
// dense_crf's inner loops, compiled once per instruction level; level.h describes the rules.
#include "dense_crf_levels.h"
#include "exponential.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

constexpr int kAxes = CrfSystem::kAxes, kCorners = CrfSystem::kCorners;
constexpr int kTaps = CrfSystem::kTaps, kSums = CrfSystem::kSums;
constexpr int kGroup = CrfSystem::kGroup, kPlane = CrfSystem::kPlane;
constexpr int kRowsAtOnce = CrfSystem::kRowsAtOnce, kBlurRows = CrfSystem::kBlurRows;
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

// -- channels --

// Where the vector that begins with channel c of item 0 lies in an array [items, channels], and the distance between
// items.
struct Place {
  int64_t begin, stride;
};
inline Place place(int64_t c, int64_t channels, int64_t items) {
  const int64_t wide = channels / kPlane * kPlane;
  if (c >= wide) return {c * items, kGroup};
  return {c / kPlane * kPlane * items + c % kPlane, kPlane};
}

// Calls f(c, lanes) for the planes, which begin with channel c and hold `lanes` channels.
template <class F>
inline void for_each_plane(int64_t channels, F f) {
  if (channels == 1) return f(0, 1);
  for (int64_t c = 0, lanes; c < channels; c += lanes) {
    lanes = channels - c < kPlane ? kGroup : kPlane;
    f(c, lanes);
  }
}

// 8, 16 or 24 channels of an item, a plane or two: what belongs to the item alone, such as its vertices, is read once
// for both.
template <int kChannels>
struct Block {
  static constexpr int kFirst = kChannels < kPlane ? kChannels : kPlane, kSecond = kChannels - kFirst;  // of each plane
  static constexpr int kWide = kLanes > 8 ? kChannels / 16 : 0, kHalves = kChannels / 8 - 2 * kWide;
  Floats wide;  // if kWide is 1
  Floats8 half[3];

  // Replaces each vector by f(vector, its first channel, those of the other blocks).
  template <class F, class... Others>
  inline __attribute__((always_inline)) void replace(F f, const Others&... others) {
    if constexpr (kWide > 0) wide = f(wide, 0, others.wide...);
    if constexpr (kHalves > 0) half[0] = f(half[0], 16 * kWide, others.half[0]...);
    if constexpr (kHalves > 1) half[1] = f(half[1], 16 * kWide + 8, others.half[1]...);
    if constexpr (kHalves > 2) half[2] = f(half[2], 16 * kWide + 16, others.half[2]...);
  }
};

// The channels of a block in an array [items, channels].
template <class B>
struct Planes {
  float *first, *second;

  Planes(float* array, int64_t c, int64_t items) : first(array + c * items), second(first + B::kFirst * items) {}

  float* at(int64_t item, int channel) const {
    return channel < B::kFirst ? first + item * B::kFirst + channel : second + item * B::kSecond + channel - B::kFirst;
  }

  B load(int64_t item) const {
    B block;
    block.replace([&](auto v, int channel) { return cpu::load<decltype(v)>(at(item, channel)); });
    return block;
  }

  void store(int64_t item, B block) const {
    block.replace([&](auto v, int channel) {
      cpu::store(at(item, channel), v);
      return v;
    });
  }
};

// Calls f(Block{}, its first channel) for all channels.
template <class F>
inline __attribute__((always_inline)) void for_each_block(int64_t channels, F f) {
  int64_t c = 0;
  for (; channels - c >= kPlane && channels - c != kPlane + kGroup; c += kPlane) f(Block<kPlane>{}, c);
  if (channels - c > kGroup) return f(Block<kPlane + kGroup>{}, c);
  if (channels - c > 0) f(Block<kGroup>{}, c);
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
    for_each_vector(s.channels, [&](auto zero, int64_t c) {
      using V = decltype(zero);
      const Place vertex = place(c, s.channels, s.vertices + 1);
      const float* const in = from + vertex.begin;
      float* const out = to + vertex.begin;
      for (int64_t i = 0; i < s.vertices; ++i) {
        const V around = load<V>(in + near[2 * i] * vertex.stride) + load<V>(in + near[2 * i + 1] * vertex.stride);
        store(out + i * vertex.stride, fma(around, broadcast<V>(other), load<V>(in + i * vertex.stride) * own));
      }
      store(out + s.vertices * vertex.stride, V{});
    });
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

// Adds the messages of a group to its unary: s.scores [kGroup, channels], unnormalized log marginals. Returns the
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
    const Planes<B> at_node(group.row, c, group.items), at_vertex(s.lattice, c, s.vertices + 1),
        at_score(s.scores, c, kGroup);
    B nodes[kTaps];
    if (kSlice) {
#pragma GCC unroll 3
      for (int t = 0; t < kTaps - 1; ++t) nodes[t] = at_node.load(group.cell + t);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      B sum;
      sum.replace([&](auto v, int channel) {
        using V = decltype(v);
        const float* const from = pixels[i] + c + channel;
        if (channel % kPlane == 0) __builtin_prefetch(from + kGroup * stride);  // too far away for the hardware's
        return c + channel + kLanesOf<V> < channels ? load<V>(from) : load_labels<V>(from, labels - c - channel);
      });
      if (kSlice) {
        nodes[(i + kTaps - 1) % kTaps] = at_node.load(group.cell + i + kTaps - 1);
        B spatial = nodes[i % kTaps], bilateral = {};
        spatial.replace([&](auto v, int) { return v * taps[0]; });
#pragma GCC unroll 3
        for (int t = 1; t < kTaps; ++t) {
          spatial.replace([&](auto v, int, auto node) { return fma(node, broadcast<decltype(v)>(taps[t]), v); },
                          nodes[(i + t) % kTaps]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kCorners; ++r) {
          const float weight = weights[r * kGroup + i];
          bilateral.replace([&](auto v, int, auto vertex) { return fma(vertex, broadcast<decltype(v)>(weight), v); },
                            at_vertex.load(corners[r * kGroup + i]));
        }
        sum.replace(
            [&](auto v, int, auto near, auto far) { return v + fma(near, broadcast<decltype(v)>(norms[i]), far); },
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

// Replaces scores by e^(score - largest). Returns 1 / their sum for each pixel.
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
      v = select(v > -50.0f, exponential(v), V{});
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
    const Planes<B> at_cell(line, c, items), at_vertex(s.next_lattice, c, s.vertices + 1),
        at_score(s.scores, c, kGroup);
    for (int i = 0; i < kGroup; ++i) {
      const float factor = scale[i], norm = norms[i];
      B marginals = at_score.load(i), normalized;
      marginals.replace([&](auto v, int) { return v * broadcast<decltype(v)>(factor); });
      normalized.replace([&](auto v, int, auto marginal) { return marginal * broadcast<decltype(v)>(norm); },
                         marginals);
      at_cell.store(cell + i, normalized);
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        const int64_t vertex = corners[r * kGroup + i];
        const float weight = weights[r * kGroup + i];
        B sum = at_vertex.load(vertex);
        sum.replace([&](auto v, int, auto marginal) { return fma(marginal, broadcast<decltype(v)>(weight), v); },
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

// rows [count, items, channels] = nodes of the grid interpolated at rows y, y + 1, ... of the image, which have the
// same nodes.
inline void read_rows(CrfSystem s, int64_t channels, int64_t y, int64_t count, float* rows, int64_t items) {
  constexpr int64_t kAhead = 128;  // floats; measured on an AMD EPYC (Zen 4): without prefetching, updates take 2% more
  const int64_t line = s.grid_width * channels;
  const float *const nodes = s.grid + y / s.step * line, *const taps = s.row_taps + y * kTaps;
  for_each_plane(channels, [&](int64_t c, int64_t lanes) {
    const float* const from = nodes + c * s.grid_width;
    for_each_vector(items * lanes, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      V node[kTaps];
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) {
        node[t] = load<V>(from + t * line + i);
        __builtin_prefetch(from + t * line + i + kAhead);
      }
      for (int64_t r = 0; r < count; ++r) {
        V sum = {};
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) sum = fma(node[t], broadcast<V>(taps[r * kTaps + t]), sum);
        store(rows + (r * channels + c) * items + i, sum);
      }
    });
  });
}

// sums [cells + kTaps, channels] = what a row of the image adds to the nodes from the first cell on. values [step,
// items, channels]: its pixels by phase, between kTaps - 1 and kTaps + 1 zeros.
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

// Adds sums [count, nodes, channels] of rows y, y + 1, ..., which have the same nodes, to the next grid.
inline void add_rows(CrfSystem s, int64_t channels, int64_t y, int64_t count, const float* sums, int64_t nodes) {
  float* rows[kTaps];
  for (int t = 0; t < kTaps; ++t) rows[t] = ring_row(s, channels, y / s.step + t);
  const float* const taps = s.add_taps + y * kTaps;
  for_each_plane(channels, [&](int64_t c, int64_t lanes) {
    const int64_t begin = c * s.grid_width;
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
    for_each_vector(s.grid_width * lanes, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      V sums[kBlurRows] = {};
      const float* from = ring_row(s, channels, begin) + c * s.grid_width + i;
      const float *const stop = s.next_grid + s.ring * line, *gauss = s.gauss + (begin - first);
      for (int64_t n = begin; n < end; ++n, from += line, ++gauss) {
        if (from >= stop) from -= s.ring * line;
        const V v = load<V>(from);
#pragma GCC unroll 4
        for (int r = 0; r < kBlurRows; ++r) sums[r] = fma(v, broadcast<V>(gauss[-r]), sums[r]);
      }
      for (int64_t r = 0; r < count; ++r) store(columns + (r * channels + c) * padded + pad + i, sums[r]);
    });
    for (int64_t r = 0; r < count; ++r) {
      convolve(columns + (r * channels + c) * padded + pad, lanes, s.gauss, s.radius, s.radius,
               s.grid + (first + r) * line + c * s.grid_width, s.grid_width * lanes);
    }
  });
}

// Updates the pixels of `count` rows, y and those after it, which have the same nodes.
template <bool kSlice, bool kSplat>
inline __attribute__((always_inline)) void update_rows(const CrfSystem& s, int64_t channels, int64_t y, int64_t count) {
  const int64_t nodes = s.cells + kTaps, items = nodes + kTaps, stride = s.step * s.labels;
  float *const rows = s.rows, *const sums = rows + kRowsAtOnce * nodes * channels,
               *const values = sums + kRowsAtOnce * nodes * channels;
  if (kSlice) read_rows(s, channels, y, count, rows, nodes);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t phase = 0; phase < s.step; ++phase) {
      const int64_t inside = (s.width - phase + s.step - 1) / s.step;  // cells of this phase inside the image
      const int64_t first = ((y + r) * s.step + phase) * s.cells * kCorners;
      Group group;
      group.pixel = s.out + ((y + r) * s.width + phase) * s.labels;
      group.row = rows + r * nodes * channels;
      group.items = nodes;
      group.taps = s.taps + phase * kTaps;
      for (group.cell = 0; group.cell < inside; group.cell += kGroup, group.pixel += kGroup * stride) {
        group.pixels = inside - group.cell < kGroup ? inside - group.cell : kGroup;
        group.norms = s.column_norm + phase * s.cells + group.cell;
        group.corners = s.corners + first + group.cell * kCorners;
        group.weights = s.weights + first + group.cell * kCorners;
        const Floats8 largest = score<kSlice>(s, channels, group);
        float scale[kGroup];
        store(scale, exponentials(s.scores, channels, largest));
        if (kSplat) {
          splat(s, channels, group, scale, values + (r * s.step + phase) * items * channels, items);
        } else {
          write_marginals(s, channels, group, scale);
        }
      }
    }
  }
  if (kSplat) {
    for (int64_t r = 0; r < count; ++r) {
      add_cells(s, channels, values + r * s.step * items * channels, items, sums + r * nodes * channels);
    }
    add_rows(s, channels, y, count, sums, nodes);
  }
}

// kChannels: the number of channels at compile time, or 0 for any. The system is a copy, which stores cannot alias.
template <bool kSlice, bool kSplat, int kChannels>
void update_many(CrfSystem s) {
  const int64_t channels = kChannels > 0 ? kChannels : s.channels;
  const int64_t line = s.grid_width * channels;
  float* const columns = s.columns;
  int64_t blurred = 0;  // rows of the next grid
  if (kSplat) {
    fill(s.next_lattice, 0.0f, (s.vertices + 1) * channels);
    const int64_t nodes = s.cells + kTaps;
    fill(s.rows + 2 * kRowsAtOnce * nodes * channels, 0.0f, kRowsAtOnce * s.step * (nodes + kTaps) * channels);
    fill(columns, 0.0f, kBlurRows * (s.grid_width + 2 * s.radius) * channels);
    for (int t = 0; t < kTaps - 1; ++t) fill(ring_row(s, channels, t), 0.0f, line);
  }
  for (int64_t y = 0, count; y < s.height; y += count) {
    const int64_t node = y / s.step, left = (node + 1) * s.step - y;
    count = left < kRowsAtOnce ? left : kRowsAtOnce;
    if (count > s.height - y) count = s.height - y;
    if (kSplat && y % s.step == 0) fill(ring_row(s, channels, node + kTaps - 1), 0.0f, line);
    update_rows<kSlice, kSplat>(s, channels, y, count);
    // Row `node` of the next grid is complete, and row `node` of this grid is not read any more.
    if (kSplat && count == left && node - s.radius + 1 - blurred >= kBlurRows) {
      blur_rows(s, channels, blurred, kBlurRows, columns);
      blurred += kBlurRows;
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
