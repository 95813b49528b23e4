// SPDX-License-Identifier: MIT
// Exponentials of vectors of floats; level.h describes the rules.
#pragma once

#include "simd.h"

namespace namedmask::cpu {
namespace {

// Horner's rule, highest power first.
template <class V, class... Rest>
inline V polynomial(V x, float first, Rest... rest) {
  V sum = broadcast<V>(first);
  ((sum = fma(sum, x, broadcast<V>(rest))), ...);
  return sum;
}

// p * 2^n for an integer n, where p and the result are normal numbers.
template <class V>
inline V times_power_of_two(V p, V n) {
  return reinterpret_cast<V>(bits(p) + (__builtin_convertvector(n, IntsOf<V>) << 23));
}

constexpr float kLog2E = 1.44269504f;

// e^x = 2^n e^r with r = x - n ln 2, |r| <= ln 2 / 2, for x >= -87.3. ln 2 has two parts, the first with so few bits
// that its product with n is exact even without a fused multiply-add. The coefficients are those of Cephes' expf (S.
// Moshier).
inline Floats exponential(Floats x) {
  const Floats n = fma(x, broadcast(kLog2E), broadcast(kRoundingBias)) - kRoundingBias;
  const Floats r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  const Floats p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f);
  return times_power_of_two(fma(p, r * r, r) + 1.0f, n);
}

// e^x for x <= 0: 0 below -87.3, NaN for NaN.
inline Floats exponential_or_zero(Floats x) { return reinterpret_cast<Floats>(bits(exponential(x)) & ~(x < -87.3f)); }

#if defined(__AVX512DQ__)
// x - floor(x), 0 for -Inf; p * 2^floor(x).
inline Floats fraction(Floats x) { return _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF); }
inline Floats8 fraction(Floats8 x) { return _mm256_maskz_reduce_ps(0xff, x, _MM_FROUND_TO_NEG_INF); }
inline Floats times_power_of_floor(Floats p, Floats x) { return _mm512_maskz_scalef_ps(0xffff, p, x); }
inline Floats8 times_power_of_floor(Floats8 p, Floats8 x) { return _mm256_maskz_scalef_ps(0xff, p, x); }
#endif

// 2^x for x <= 0 within 2 ulp; NaN for NaN. The polynomials are relative minimax on an interval of length 1 around or
// from 0, with their value at 0 fixed at 1. Cheaper than `exponential`: it requires no reduction by ln 2, and AVX-512
// has instructions for both ends of it.
template <class V>
inline V power_of_two(V x) {
#if defined(__AVX512DQ__)
  const V p =
      polynomial(fraction(x), 1.86713028e-3f, 9.01702978e-3f, 5.57999127e-2f, 2.40164444e-1f, 6.93151295e-1f, 1.0f);
  return times_power_of_floor(p, x);
#else
  // Smaller numbers give 2^-126: they are lost in a sum that contains a 1.
  x = larger(broadcast<V>(-126.0f), x);  // x if it is NaN
  const V n = nearest(x);
  const V p = polynomial(x - n, 1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f);
  return times_power_of_two(p, n);
#endif
}

}  // namespace
}  // namespace namedmask::cpu
