// SPDX-License-Identifier: MIT
// resize's inner loops, compiled once per instruction level; level.h describes the rules.
#include "resize_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

// -- float32 ---------------------------------------------------------------------------------------------------------

typedef VectorOf<float, 4>::Type Floats4;

void blend_rows(const float* rows, const FloatTaps& taps, int64_t y, int64_t n, float* out) {
  constexpr int kTogether = 4;  // vectors, so that their sums hide each other's latency
  const float* const weights = taps.weights + y * taps.most;
  const int64_t count = taps.counts[y];
  rows += taps.first[y] * n;
  int64_t i = 0;
  for (; i + kTogether * kLanes <= n; i += kTogether * kLanes) {
    Floats sums[kTogether] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats weight = broadcast<Floats>(weights[k]);
      for (int v = 0; v < kTogether; ++v) sums[v] = fma(load(rows + k * n + i + v * kLanes), weight, sums[v]);
    }
    for (int v = 0; v < kTogether; ++v) store(out + i + v * kLanes, sums[v]);
  }
  for (; i + kLanes <= n; i += kLanes) {
    Floats sum = {};
    for (int64_t k = 0; k < count; ++k) sum = fma(load(rows + k * n + i), broadcast<Floats>(weights[k]), sum);
    store(out + i, sum);
  }
  for (; i < n; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < count; ++k) sum = __builtin_fmaf(rows[k * n + i], weights[k], sum);
    out[i] = sum;
  }
}

// A pixel of up to four channels is a vector; what it holds beyond them is overwritten by the next pixel.
void blend_vectors(const float* row, const FloatTaps& taps, int64_t width, int64_t channels, float* out) {
  const float* weights = taps.weights;
  for (int64_t x = 0; x < width; ++x, weights += taps.most) {
    const float* pixel = row + taps.first[x] * channels;
    const int64_t count = taps.counts[x];
    Floats4 even = {}, odd = {};
    int64_t k = 0;
    for (; k + 2 <= count; k += 2, pixel += 2 * channels) {
      even += load<Floats4>(pixel) * weights[k];
      odd += load<Floats4>(pixel + channels) * weights[k + 1];
    }
    if (k < count) even += load<Floats4>(pixel) * weights[k];
    store(out + x * channels, even + odd);
  }
}

void blend_pixels(const float* row, const FloatTaps& taps, int64_t width, int64_t channels, float* out) {
  if (channels == 3 || channels == 4) return blend_vectors(row, taps, width, channels, out);
  for (int64_t x = 0; x < width; ++x) {
    const float *pixel = row + taps.first[x] * channels, *weights = taps.weights + x * taps.most;
    for (int64_t c = 0; c < channels; ++c) {
      float sum = 0;
      for (int64_t k = 0; k < taps.counts[x]; ++k) sum += pixel[k * channels + c] * weights[k];
      out[x * channels + c] = sum;
    }
  }
}

// -- uint8 -----------------------------------------------------------------------------------------------------------

#if defined(__SSE2__)
// 256 bits at AVX-512, too: the loops below are bound by shuffles, of which CPUs execute half as many at 512 bits.
#if defined(__AVX2__)
typedef __m256i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const Bytes*)p); }
inline void store_bytes(uint8_t* p, Bytes v) { _mm256_storeu_si256((Bytes*)p, v); }
inline Bytes low(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }  // bytes a0 b0 a1 b1 ... of 128-bit lanes
inline Bytes high(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes dot_pairs(Bytes a, Bytes b, Bytes sum) { return _mm256_add_epi32(_mm256_madd_epi16(a, b), sum); }
inline Bytes shift_right(Bytes v, __m128i count) { return _mm256_sra_epi32(v, count); }
inline Bytes clamp(Bytes a, Bytes b, Bytes c, Bytes d) {
  return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
inline Bytes load_lanes(const uint8_t* p, const uint8_t* q) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                 _mm_loadu_si128((const __m128i*)q), 1);
}
inline __m128i lane(Bytes v, int i) { return i == 0 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1); }
#else
typedef __m128i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm_loadu_si128((const Bytes*)p); }
inline void store_bytes(uint8_t* p, Bytes v) { _mm_storeu_si128((Bytes*)p, v); }
inline Bytes low(Bytes a, Bytes b) { return _mm_unpacklo_epi8(a, b); }
inline Bytes high(Bytes a, Bytes b) { return _mm_unpackhi_epi8(a, b); }
inline Bytes ints(int32_t x) { return _mm_set1_epi32(x); }
inline Bytes dot_pairs(Bytes a, Bytes b, Bytes sum) { return _mm_add_epi32(_mm_madd_epi16(a, b), sum); }
inline Bytes shift_right(Bytes v, __m128i count) { return _mm_sra_epi32(v, count); }
inline Bytes clamp(Bytes a, Bytes b, Bytes c, Bytes d) {
  return _mm_packus_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d));
}
inline Bytes load_lanes(const uint8_t* p, const uint8_t*) { return load_bytes(p); }
inline __m128i lane(Bytes v, int) { return v; }
#endif
constexpr int64_t kBytes = sizeof(Bytes);

// kTogether vectors of the sum of taps; weights [taps rounded up to even].
template <int kTogether>
inline void blend_vectors(const uint8_t* rows, const int16_t* weights, int64_t taps, int64_t n, Bytes rounding,
                          __m128i shift, uint8_t* out) {
  const Bytes zero = {};
  Bytes sums[kTogether][4];
  for (auto& of_vector : sums) {
    for (Bytes& sum : of_vector) sum = rounding;
  }
  for (int64_t k = 0; k < taps; k += 2) {
    const uint8_t *const a = rows + k * n, *const b = k + 1 < taps ? a + n : a;
    int32_t pair;
    __builtin_memcpy(&pair, weights + k, sizeof pair);
    const Bytes weight = ints(pair);
    for (int v = 0; v < kTogether; ++v) {
      const Bytes one = load_bytes(a + v * kBytes), other = load_bytes(b + v * kBytes);
      const Bytes first = low(one, other), second = high(one, other);
      sums[v][0] = dot_pairs(low(first, zero), weight, sums[v][0]);
      sums[v][1] = dot_pairs(high(first, zero), weight, sums[v][1]);
      sums[v][2] = dot_pairs(low(second, zero), weight, sums[v][2]);
      sums[v][3] = dot_pairs(high(second, zero), weight, sums[v][3]);
    }
  }
  for (int v = 0; v < kTogether; ++v) {
    for (Bytes& sum : sums[v]) sum = shift_right(sum, shift);
    store_bytes(out + v * kBytes, clamp(sums[v][0], sums[v][1], sums[v][2], sums[v][3]));
  }
}

// The transpose of 16 vectors in each 128-bit lane. A vector and a byte are four bits each of an index, which every
// pass rotates by one.
inline void transpose(Bytes (&v)[16]) {
  for (int pass = 0; pass < 4; ++pass) {
    Bytes next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = low(v[i], v[i + 8]);
      next[2 * i + 1] = high(v[i], v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = next[i];
  }
}
#endif

void blend_bytes(const uint8_t* all, const ByteTaps& taps, int64_t y, int64_t count, int64_t n, uint8_t* out) {
  const int64_t padded = taps.most + taps.most % 2;
  for (int64_t end = y + count; y < end; ++y, out += n) {
    const int32_t rounding = 1 << (taps.shifts[y] - 1);
    const uint8_t* const rows = all + taps.first[y] * n;
    const int16_t* const weights = taps.weights + y * padded;
    const int64_t taps_of_row = taps.counts[y];
    int64_t i = 0;
#if defined(__SSE2__)
    const Bytes half = ints(rounding);
    const __m128i shift = _mm_cvtsi32_si128(taps.shifts[y]);
    for (; i + 2 * kBytes <= n; i += 2 * kBytes) {
      blend_vectors<2>(rows + i, weights, taps_of_row, n, half, shift, out + i);
    }
    for (; i + kBytes <= n; i += kBytes) blend_vectors<1>(rows + i, weights, taps_of_row, n, half, shift, out + i);
#endif
    for (; i < n; ++i) {
      int32_t sum = rounding;
      for (int64_t k = 0; k < taps_of_row; ++k) sum += rows[k * n + i] * weights[k];
      sum >>= taps.shifts[y];
      out[i] = static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
    }
  }
}

void to_columns(const uint8_t* rows, int64_t count, int64_t n, uint8_t* out) {
#if defined(__SSE2__)
  const auto row = [&](int64_t r) { return rows + (r < count ? r : count - 1) * n; };
  for (int64_t start = 0; n >= 16 && start < n; start += 16) {
    const int64_t i = start + 16 <= n ? start : n - 16;
    for (int64_t r = 0; r < kResizeRows; r += kBytes) {
      Bytes v[16];
      for (int64_t k = 0; k < 16; ++k) v[k] = load_lanes(row(r + k) + i, row(r + k + 16) + i);
      transpose(v);
      for (int64_t k = 0; k < 16; ++k) store_bytes(out + (i + k) * kResizeRows + r, v[k]);
    }
  }
  if (n >= 16) return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < count; ++r) out[i * kResizeRows + r] = rows[r * n + i];
  }
}

void to_rows(const uint8_t* columns, int64_t count, int64_t n, uint8_t* out) {
#if defined(__SSE2__)
  for (int64_t start = 0; n >= 16 && start < n; start += 16) {
    const int64_t i = start + 16 <= n ? start : n - 16;
    for (int64_t r = 0; r < count; r += kBytes) {
      Bytes v[16];
      for (int64_t k = 0; k < 16; ++k) v[k] = load_bytes(columns + (i + k) * kResizeRows + r);
      transpose(v);
      for (int64_t k = 0; k < kBytes && r + k < count; ++k) {
        _mm_storeu_si128((__m128i*)(out + (r + k) * n + i), lane(v[k % 16], static_cast<int>(k / 16)));
      }
    }
  }
  if (n >= 16) return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < count; ++r) out[r * n + i] = columns[i * kResizeRows + r];
  }
}

constexpr ResizeKernels kKernels = {blend_pixels, blend_rows, blend_bytes, to_columns, to_rows};

}  // namespace
}  // namespace namedmask::cpu
