// SPDX-License-Identifier: MIT
// bilateral_solver's inner loops, compiled once per instruction level; level.h describes the rules.
// Eight lanes and the same order of additions everywhere, and no fused multiply-add that rounds differently: all levels
// give the same bits.
#include "bilateral_solver_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

constexpr int kSlice = BilateralSystem::kSlice;

// A sum of products in double. Without AVX-512 not a Doubles8: GCC 12 keeps a sum that is wider than a register in
// memory.
struct Dot {
#if defined(__AVX512F__)
  Doubles8 sums = {};

  void add(Floats8 a, Floats8 b) {
    sums = add_exact_product(__builtin_convertvector(a, Doubles8), __builtin_convertvector(b, Doubles8), sums);
  }
  double sum() const { return sum_of_lanes(sums); }
#else
  typedef VectorOf<float, 4>::Type Floats4;
  typedef VectorOf<double, 4>::Type Doubles4;
  Doubles4 low = {}, high = {};

  void add(Floats8 a, Floats8 b) {
    const Floats4 al = {a[0], a[1], a[2], a[3]}, ah = {a[4], a[5], a[6], a[7]};
    const Floats4 bl = {b[0], b[1], b[2], b[3]}, bh = {b[4], b[5], b[6], b[7]};
    low += __builtin_convertvector(al, Doubles4) * __builtin_convertvector(bl, Doubles4);
    high += __builtin_convertvector(ah, Doubles4) * __builtin_convertvector(bh, Doubles4);
  }
  double pair(int i) const { return low[i] + high[i]; }
  double sum() const { return (pair(0) + pair(2)) + (pair(1) + pair(3)); }
#endif
};

// Calls f(i, sum of term(i, neighbors' indices)) for every slice.
template <class Term, class F>
inline void for_each_slice(const BilateralSystem& s, Term term, F f) {
  const int32_t* index = s.neighbors;
  for (int64_t i = 0; i < s.count; i += kSlice) {
    Floats8 sum = {};
    for (int32_t k = s.widths[i / kSlice]; k > 0; --k, index += kSlice) sum += term(i, index);
    f(i, sum);
  }
}

// With n from bistochastization the system is  (weight + smoothness * L) x = weight * mean,  where L is the Laplacian
// of the graph with edge weights n_i * n_j. Scaled by the square root of its diagonal D
// it becomes  (1 - w N w) u = ...  with the 0/1 neighbor matrix N and w = n * sqrt(smoothness / D). This includes the
// Jacobi preconditioner, and an iteration accesses the fewest arrays. u is the change of the means, so rounding affects
// only the change, and a constant target has a residual of exactly 0.
void solve(const BilateralSystem& system) {
  const BilateralSystem s = system;  // a copy, which stores through pointers cannot alias
  float* const w = s.scratch[0];
  float* const diagonal = s.scratch[1];
  float* const residual = s.scratch[2];
  float* const direction = s.scratch[3];
  float* const product = s.scratch[4];  // of the matrix and the direction
  float* const change = s.scratch[5];
  float* const weighted = s.scratch[6];  // w * direction, read by neighbors
  const float smoothness = static_cast<float>(s.smoothness);

  float* n = product;
  float* next = change;
  for (int64_t i = 0; i < s.count; ++i) n[i] = 1.0f;
  const auto neighbor_n = [&](int64_t, const int32_t* index) { return gather(n, index); };
  for (int round = 0; round < 10; ++round) {
    for_each_slice(s, neighbor_n, [&](int64_t i, Floats8 sum) {
      const Floats8 own = load<Floats8>(n + i);
      store(next + i, square_root(own * load<Floats8>(s.mass + i) / (10.0f * own + sum)));
    });
    float* const swap = n;
    n = next;
    next = swap;
  }
  for_each_slice(s, neighbor_n, [&](int64_t i, Floats8 sum) {
    store(diagonal + i, smoothness * load<Floats8>(n + i) * sum + load<Floats8>(s.weight + i));
  });

  Dot target_norm, residual_norm, rho_sum;
  for_each_slice(
      s,
      [&](int64_t i, const int32_t* index) {
        return gather(n, index) * (gather(s.value, index) - load<Floats8>(s.value + i));
      },
      [&](int64_t i, Floats8 sum) {
        const Floats8 d = load<Floats8>(diagonal + i), b = load<Floats8>(s.weight + i) * load<Floats8>(s.value + i);
        const Floats8 plain = smoothness * load<Floats8>(n + i) * sum, r = plain / square_root(d);
        store(residual + i, r);
        target_norm.add(b, b);
        residual_norm.add(plain, plain);
        rho_sum.add(r, r);
      });
  for (int64_t i = 0; i < s.count; i += kSlice) {
    const Floats8 zero = {};
    store(w + i, load<Floats8>(n + i) * square_root(smoothness / load<Floats8>(diagonal + i)));
    store(direction + i, zero);
    store(change + i, zero);  // n is in product or change and is no longer needed
  }

  const double enough = s.tolerance * s.tolerance * target_norm.sum();
  double rho = rho_sum.sum(), norm = residual_norm.sum(), before = 0;
  for (int64_t step = 0; step < s.iterations && norm > enough; ++step) {
    const float beta = step == 0 ? 0.0f : static_cast<float>(rho / before);
    for (int64_t i = 0; i < s.count; i += kSlice) {
      const Floats8 p = load<Floats8>(residual + i) + beta * load<Floats8>(direction + i);
      store(direction + i, p);
      store(weighted + i, load<Floats8>(w + i) * p);
    }
    Dot curvature;
    for_each_slice(
        s, [&](int64_t, const int32_t* index) { return gather(weighted, index); },
        [&](int64_t i, Floats8 sum) {
          const Floats8 p = load<Floats8>(direction + i), q = p - load<Floats8>(w + i) * sum;
          store(product + i, q);
          curvature.add(p, q);
        });
    const double bend = curvature.sum();
    if (!(bend > 0)) break;  // the residual has underflowed
    const float length = static_cast<float>(rho / bend);
    Dot rho_next, norm_next;
    for (int64_t i = 0; i < s.count; i += kSlice) {
      store(change + i, load<Floats8>(change + i) + length * load<Floats8>(direction + i));
      const Floats8 r = load<Floats8>(residual + i) - length * load<Floats8>(product + i);
      store(residual + i, r);
      rho_next.add(r, r);
      norm_next.add(r * load<Floats8>(diagonal + i), r);
    }
    before = rho;
    rho = rho_next.sum();
    norm = norm_next.sum();
  }
  for (int64_t i = 0; i < s.count; i += kSlice) {
    store(s.value + i,
          load<Floats8>(s.value + i) + load<Floats8>(change + i) / square_root(load<Floats8>(diagonal + i)));
  }
}

struct Pixels {
  Floats8 r, g, b;
};

// Loads eight pixels; reads 28 bytes.
inline Pixels load_pixels(const uint8_t* rgb) {
#if defined(__AVX2__)
  const __m256i four_and_four = _mm256_setr_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb)),
                                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 12)));
  const auto channel = [&](int c) {  // byte c of each pixel, widened
    const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(0x80808000u) + c),
                                        _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9));
    return reinterpret_cast<Floats8>(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(four_and_four, at)));
  };
  return {channel(0), channel(1), channel(2)};
#else
  Pixels p;
  for (int i = 0; i < kSlice; ++i) {
    p.r[i] = rgb[3 * i];
    p.g[i] = rgb[3 * i + 1];
    p.b[i] = rgb[3 * i + 2];
  }
  return p;
#endif
}

// In float32, where the planes times 1000 and 31250 are integers below 2^24 and therefore exact; only the division
// rounds, by less than kClose. Pixels that close to a cell border get a negative key, and later the exact one from
// color_key.
struct Scale {
  float luma, blue, red;  // 1 / size of a cell
  int32_t luma_step, blue_step, red_step, offset;
};

inline Ints8 eight_keys(const uint8_t* rgb, const Scale& scale) {
  constexpr float kClose = 1.0f / (1 << 14);
  const auto [r, g, b] = load_pixels(rgb);
  const Floats8 y = (299.0f * r + 587.0f * g + 114.0f * b) * scale.luma;
  const Floats8 u = (4000000.0f - 5273.0f * r - 10352.0f * g + 15625.0f * b) * scale.blue;
  const Floats8 v = (4000000.0f + 15625.0f * r - 13084.0f * g - 2541.0f * b) * scale.red;
  const Ints8 yi = __builtin_convertvector(y, Ints8), ui = __builtin_convertvector(u, Ints8),
              vi = __builtin_convertvector(v, Ints8);
  const Floats8 yf = y - __builtin_convertvector(yi, Floats8), uf = u - __builtin_convertvector(ui, Floats8),
                vf = v - __builtin_convertvector(vi, Floats8);
  const Ints8 close =
      (yf < kClose) | (yf > 1 - kClose) | (uf < kClose) | (uf > 1 - kClose) | (vf < kClose) | (vf > 1 - kClose);
  return (yi * scale.luma_step + ui * scale.blue_step + vi * scale.red_step + scale.offset) | close;
}

// Computes the exact keys of the pixels in [begin, end) whose key is negative.
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
  constexpr int64_t kChunk = 8 * kSlice;
  const Scale scale = {static_cast<float>(1 / (1000 * grid.sizes[0])),
                       static_cast<float>(1 / (31250 * grid.sizes[1])),
                       static_cast<float>(1 / (31250 * grid.sizes[2])),
                       grid.steps[0],
                       grid.steps[1],
                       grid.steps[2],
                       grid.offset};
  int64_t i = 0;
  for (; i + kChunk + 2 <= n; i += kChunk) {  // load_pixels reads 4 bytes beyond its pixels
    Ints8 any = {};
    for (int64_t j = i; j < i + kChunk; j += kSlice) {
      const Ints8 key = eight_keys(rgb + 3 * j, scale);
      store(keys + j, key);
      any |= key;
    }
    int32_t sign = 0;
    for (int lane = 0; lane < kSlice; ++lane) sign |= any[lane];
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
