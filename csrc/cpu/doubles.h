// SPDX-License-Identifier: MIT
// Eight doubles at a time on every level, in whatever registers it has, so that sums are added in the same order and
// give the same bits; level.h says what is allowed here.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

typedef double W __attribute__((vector_size(64)));
typedef float H __attribute__((vector_size(32)));

inline W read(const double* p) {
  W w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}

inline void write(double* p, const W& w) { __builtin_memcpy(p, &w, sizeof w); }

inline W widen(const float* p) {
#if defined(__AVX512F__)
  return (W)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));  // of the vector type GCC makes six instructions
#else
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, W);
#endif
}

inline void write_floats(float* p, const W& w) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_maskz_cvtpd_ps(0xff, (__m512d)w));
#else
  const H h = __builtin_convertvector(w, H);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// a b + c for products that a double holds: rounded before the addition or not, the bits are the same.
inline W add_exact_product(const W& a, const W& b, const W& c) {
#if defined(__AVX512F__)
  return (W)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return a * b + c;
#endif
}

inline W spread(double a) { return W{a, a, a, a, a, a, a, a}; }

// The lanes' sum in the order that halving a vector gives.
inline double fold(const W& w) {
#if defined(__AVX512F__)
  const __m256d half =
      _mm512_maskz_extractf64x4_pd(0xf, (__m512d)w, 0) + _mm512_maskz_extractf64x4_pd(0xf, (__m512d)w, 1);
  const __m128d quarter = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return quarter[0] + quarter[1];
#else
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
#endif
}

}  // namespace
}  // namespace namedmask::cpu
