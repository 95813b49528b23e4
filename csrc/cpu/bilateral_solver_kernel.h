// SPDX-License-Identifier: MIT
// bilateral_solver's inner loops, included by one file per instruction level; level.h says what is allowed here.
// Eight lanes and one order of additions everywhere, no fused multiply-adds: all levels give the same bits.
#include "bilateral_solver_levels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

constexpr int kLanes = BilateralSystem::kLanes;
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double D4 __attribute__((vector_size(32)));
typedef double D8 __attribute__((vector_size(64)));
typedef float F4 __attribute__((vector_size(16)));

inline F8 load(const float* p) { return *reinterpret_cast<const F8*>(p); }
inline void store(float* p, F8 v) { *reinterpret_cast<F8*>(p) = v; }

// Not the gather instruction: on an AMD EPYC the whole solve took 1.6 times as long with it, and on a Xeon (Sapphire
// Rapids) it is no faster than loads that fill all lanes, of which one is kept. Those need no shuffles, which there is
// a single unit for: 0.86 of the time.
inline F8 gather(const float* values, const int32_t* index) {
#if defined(__AVX2__)
  const auto lane = [&](int i) { return _mm256_broadcast_ss(values + index[i]); };
  const __m256 ab = _mm256_blend_ps(lane(0), lane(1), 0xaa), cd = _mm256_blend_ps(lane(2), lane(3), 0xaa);
  const __m256 ef = _mm256_blend_ps(lane(4), lane(5), 0xaa), gh = _mm256_blend_ps(lane(6), lane(7), 0xaa);
  return reinterpret_cast<F8>(_mm256_blend_ps(_mm256_blend_ps(ab, cd, 0xcc), _mm256_blend_ps(ef, gh, 0xcc), 0xf0));
#else
  return F8{values[index[0]], values[index[1]], values[index[2]], values[index[3]],
            values[index[4]], values[index[5]], values[index[6]], values[index[7]]};
#endif
}

inline F8 root(F8 v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// A sum of products, in double.
struct Dot {
#if defined(__AVX512F__)
  D8 sums = {};

  void add(F8 a, F8 b) { sums += __builtin_convertvector(a, D8) * __builtin_convertvector(b, D8); }
  double pair(int i) const { return sums[i] + sums[i + 4]; }
#else  // the compiler would split the wide vectors by way of memory
  D4 low = {}, high = {};

  void add(F8 a, F8 b) {
    const F4 al = {a[0], a[1], a[2], a[3]}, ah = {a[4], a[5], a[6], a[7]};
    const F4 bl = {b[0], b[1], b[2], b[3]}, bh = {b[4], b[5], b[6], b[7]};
    low += __builtin_convertvector(al, D4) * __builtin_convertvector(bl, D4);
    high += __builtin_convertvector(ah, D4) * __builtin_convertvector(bh, D4);
  }
  double pair(int i) const { return low[i] + high[i]; }
#endif

  double sum() const { return (pair(0) + pair(2)) + (pair(1) + pair(3)); }
};

// Calls f(i, sum of term(i, neighbors' indices)) for every slice.
template <class Term, class F>
inline void for_each_slice(const BilateralSystem& s, Term term, F f) {
  const int32_t* index = s.neighbors;
  for (int64_t i = 0; i < s.count; i += kLanes) {
    F8 sum = {};
    for (int32_t k = s.widths[i / kLanes]; k > 0; --k, index += kLanes) sum += term(i, index);
    f(i, sum);
  }
}

// With n from bistochastization the system is  (weight + smoothness * L) x = weight * mean,  where L is the Laplacian
// of the graph whose edges weigh n_i * n_j, and weight = confidence * mass. Scaled by the square root of its diagonal D
// it becomes  (1 - w N w) u = ...  with N the 0/1 neighbor matrix and w = n * sqrt(smoothness / D): Jacobi's
// preconditioner is then built in and a step touches the fewest arrays. u is what is added to the means, so rounding
// hurts only the change, and a constant target has a residual of exactly 0.
void solve(const BilateralSystem& system) {
  const BilateralSystem s = system;  // a copy that no store through a pointer can change
  float* const w = s.scratch[0];
  float* const diagonal = s.scratch[1];
  float* const residual = s.scratch[2];
  float* const direction = s.scratch[3];
  float* const image = s.scratch[4];  // of the direction
  float* const change = s.scratch[5];
  float* const weighted = s.scratch[6];  // w * direction, what neighbors read
  const float smoothness = static_cast<float>(s.smoothness), confidence = static_cast<float>(s.confidence);

  float* n = image;
  float* next = change;
  for (int64_t i = 0; i < s.count; ++i) n[i] = 1.0f;
  const auto neighbor_n = [&](int64_t, const int32_t* index) { return gather(n, index); };
  for (int round = 0; round < 10; ++round) {
    for_each_slice(s, neighbor_n, [&](int64_t i, F8 sum) {
      const F8 own = load(n + i);
      store(next + i, root(own * load(s.mass + i) / (10.0f * own + sum)));
    });
    float* const swap = n;
    n = next;
    next = swap;
  }
  for_each_slice(s, neighbor_n, [&](int64_t i, F8 sum) {
    store(diagonal + i, smoothness * load(n + i) * sum + confidence * load(s.mass + i));
  });

  Dot target_norm, residual_norm, rho_sum;
  for_each_slice(
      s,
      [&](int64_t i, const int32_t* index) { return gather(n, index) * (gather(s.value, index) - load(s.value + i)); },
      [&](int64_t i, F8 sum) {
        const F8 d = load(diagonal + i), b = confidence * load(s.mass + i) * load(s.value + i);
        const F8 plain = smoothness * load(n + i) * sum, r = plain / root(d);
        store(residual + i, r);
        target_norm.add(b, b);
        residual_norm.add(plain, plain);
        rho_sum.add(r, r);
      });
  for (int64_t i = 0; i < s.count; i += kLanes) {
    const F8 zero = {};
    store(w + i, load(n + i) * root(smoothness / load(diagonal + i)));
    store(direction + i, zero);
    store(change + i, zero);  // n lies in image or change and is not needed any more
  }

  const double enough = s.tolerance * s.tolerance * target_norm.sum();
  double rho = rho_sum.sum(), norm = residual_norm.sum(), before = 0;
  for (int64_t step = 0; step < s.iterations && norm > enough; ++step) {
    const float beta = step == 0 ? 0.0f : static_cast<float>(rho / before);
    for (int64_t i = 0; i < s.count; i += kLanes) {
      const F8 p = load(residual + i) + beta * load(direction + i);
      store(direction + i, p);
      store(weighted + i, load(w + i) * p);
    }
    Dot curvature;
    for_each_slice(
        s, [&](int64_t, const int32_t* index) { return gather(weighted, index); },
        [&](int64_t i, F8 sum) {
          const F8 p = load(direction + i), q = p - load(w + i) * sum;
          store(image + i, q);
          curvature.add(p, q);
        });
    const double bend = curvature.sum();
    if (!(bend > 0)) break;  // the residual has underflowed
    const float length = static_cast<float>(rho / bend);
    Dot rho_next, norm_next;
    for (int64_t i = 0; i < s.count; i += kLanes) {
      store(change + i, load(change + i) + length * load(direction + i));
      const F8 r = load(residual + i) - length * load(image + i);
      store(residual + i, r);
      rho_next.add(r, r);
      norm_next.add(r * load(diagonal + i), r);
    }
    before = rho;
    rho = rho_next.sum();
    norm = norm_next.sum();
  }
  for (int64_t i = 0; i < s.count; i += kLanes) {
    store(s.value + i, load(s.value + i) + load(change + i) / root(load(diagonal + i)));
  }
}

struct Pixels {
  F8 r, g, b;
};

// Eight pixels; reads 28 bytes.
inline Pixels load_pixels(const uint8_t* rgb) {
#if defined(__AVX2__)
  const __m256i four_and_four = _mm256_setr_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb)),
                                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 12)));
  const auto channel = [&](int c) {  // byte c of each pixel, widened
    const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(0x80808000u) + c),
                                        _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9));
    return reinterpret_cast<F8>(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(four_and_four, at)));
  };
  return {channel(0), channel(1), channel(2)};
#else
  Pixels p;
  for (int i = 0; i < kLanes; ++i) {
    p.r[i] = rgb[3 * i];
    p.g[i] = rgb[3 * i + 1];
    p.b[i] = rgb[3 * i + 2];
  }
  return p;
#endif
}

// In float32, where the planes times 1000 and 31250 are whole numbers below 2^24 and so exact; only the division
// rounds, by less than kClose. Pixels that close to a border of a cell get a negative key here and their own from
// color_key.
struct Scale {
  float luma, blue, red;  // 1 / size of a cell
  int32_t luma_step, blue_step, red_step, offset;
};

inline I8 eight_keys(const uint8_t* rgb, const Scale& scale) {
  constexpr float kClose = 1.0f / (1 << 14);
  const auto [r, g, b] = load_pixels(rgb);
  const F8 y = (299.0f * r + 587.0f * g + 114.0f * b) * scale.luma;
  const F8 u = (4000000.0f - 5273.0f * r - 10352.0f * g + 15625.0f * b) * scale.blue;
  const F8 v = (4000000.0f + 15625.0f * r - 13084.0f * g - 2541.0f * b) * scale.red;
  const I8 yi = __builtin_convertvector(y, I8), ui = __builtin_convertvector(u, I8),
           vi = __builtin_convertvector(v, I8);
  const F8 yf = y - __builtin_convertvector(yi, F8), uf = u - __builtin_convertvector(ui, F8),
           vf = v - __builtin_convertvector(vi, F8);
  const I8 close =
      (yf < kClose) | (yf > 1 - kClose) | (uf < kClose) | (uf > 1 - kClose) | (vf < kClose) | (vf > 1 - kClose);
  return (yi * scale.luma_step + ui * scale.blue_step + vi * scale.red_step + scale.offset) | close;
}

// Gives their keys to the pixels of [begin, end) whose key is negative.
void settle(const uint8_t* rgb, int64_t begin, int64_t end, const ColorTable& grid, int32_t* keys) {
  int last_color = -1;
  int32_t last_key = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (keys[i] >= 0) continue;
    const int r = rgb[3 * i], g = rgb[3 * i + 1], b = rgb[3 * i + 2], color = r << 16 | g << 8 | b;
    if (r == g && g == b) {
      keys[i] = grid.gray[r];
    } else {
      if (color != last_color) last_key = color_key(grid, r, g, b);
      last_color = color;
      keys[i] = last_key;
    }
  }
}

void keys(const uint8_t* rgb, int64_t n, const ColorTable& grid, int32_t* keys) {
  constexpr int64_t kChunk = 8 * kLanes;
  const Scale scale = {static_cast<float>(1 / (1000 * grid.sizes[0])),
                       static_cast<float>(1 / (31250 * grid.sizes[1])),
                       static_cast<float>(1 / (31250 * grid.sizes[2])),
                       grid.steps[0],
                       grid.steps[1],
                       grid.steps[2],
                       grid.offset};
  int64_t i = 0;
  for (; i + kChunk + 2 <= n; i += kChunk) {  // load_pixels reads a pixel and a third too far
    I8 any = {};
    for (int64_t j = i; j < i + kChunk; j += kLanes) {
      const I8 key = eight_keys(rgb + 3 * j, scale);
      *reinterpret_cast<I8*>(keys + j) = key;
      any |= key;
    }
    int32_t sign = 0;
    for (int lane = 0; lane < kLanes; ++lane) sign |= any[lane];
    if (sign < 0) settle(rgb, i, i + kChunk, grid, keys);
  }
  for (int64_t j = i; j < n; ++j) keys[j] = -1;
  settle(rgb, i, n, grid, keys);
}

void slice(const float* values, const int32_t* index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = values[index[i]];
}

constexpr BilateralKernels kKernels = {keys, solve, slice};

}  // namespace
}  // namespace namedmask::cpu
