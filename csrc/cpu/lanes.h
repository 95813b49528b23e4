// SPDX-License-Identifier: MIT
// Vectors of floats as wide as the instruction level of the including file; level.h says what is allowed here.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

// A micro tile of kRows x kVectors vectors of sums fills the registers of the level.
constexpr int kVectors = 2;

#if defined(__AVX512F__)
typedef __m512 V;
constexpr int kLanes = 16, kRows = 12;
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V broadcast(float a) { return _mm512_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// With a mask of ones, since GCC 12 takes the plain form's undefined source for a mistake of ours.
inline V larger(V a, V b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline uint32_t above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
#elif defined(__AVX2__)
typedef __m256 V;
constexpr int kLanes = 8, kRows = 6;
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V broadcast(float a) { return _mm256_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline uint32_t above(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
#else
typedef float V __attribute__((vector_size(16)));
constexpr int kLanes = 4, kRows = 6;
inline V load(const float* p) { return V{p[0], p[1], p[2], p[3]}; }
inline void store(float* p, V v) { p[0] = v[0], p[1] = v[1], p[2] = v[2], p[3] = v[3]; }
inline V broadcast(float a) { return V{a, a, a, a}; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V larger(V a, V b) {
  for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
inline uint32_t above(V a, V b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return bits;
}
#endif

typedef int32_t I __attribute__((vector_size(kLanes * 4)));

// sums[i][v] += a[i * a_stride + k] * lane v of b[k * b_stride], k < depth, one k after the other: an element's bits
// depend on nothing but its row and its column.
template <int kWide, class Columns>
inline __attribute__((always_inline)) void multiply_add(V (&sums)[kRows][kWide], const float* a, int64_t a_stride,
                                                        Columns columns, int64_t b_stride, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    V b[kWide];
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) b[v] = load(columns(v) + k * b_stride);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const V factor = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) sums[i][v] = fma(factor, b[v], sums[i][v]);
    }
  }
}

}  // namespace
}  // namespace namedmask::cpu
