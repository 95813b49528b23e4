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

// e^x = 2^n e^r with r = x - n ln 2, |r| <= ln 2 / 2. ln 2 has two parts, the first with so few bits that its product
// with n is exact even without a fused multiply-add. Terms computes n and e^r. There are two because they round
// differently: with one of them for all operators, results would change.
template <class Terms, class V>
inline V exponential(V x) {
  const V n = Terms::round(x);
  const V r = fma(n, broadcast<V>(-Terms::kLn2Low), fma(n, broadcast<V>(-Terms::kLn2High), x));
  return times_power_of_two(Terms::polynomial(r), n);
}

// The coefficients of Cephes' expf (S. Moshier). For x >= -87.3.
struct CephesTerms {
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

  template <class V>
  static V round(V x) {
    return fma(x, broadcast<V>(kLog2E), broadcast<V>(kRoundingBias)) - kRoundingBias;
  }

  template <class V>
  static V polynomial(V r) {
    const V p = cpu::polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f);
    return fma(p, r * r, r) + 1.0f;
  }
};

// Within 2e-7 of e^x, relative, for x from -87 to 88.
struct TaylorTerms {
  static constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;

  template <class V>
  static V round(V x) {
    return nearest(x * kLog2E);
  }

  template <class V>
  static V polynomial(V r) {
    return cpu::polynomial(r, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  }
};

// e^x for x <= 0: 0 below -87.3, NaN for NaN.
inline Floats exponential_or_zero(Floats x) {
  return reinterpret_cast<Floats>(bits(exponential<CephesTerms>(x)) & ~(x < -87.3f));
}

// 2^x for x <= 0 within 2 ulp; NaN for NaN. The polynomials are relative minimax on an interval of length 1 around or
// from 0, with their value at 0 fixed at 1. Not an instance of `exponential`: it requires no reduction by ln 2, and
// AVX-512 has instructions for both ends of it.
inline Floats power_of_two(Floats x) {
#if defined(__AVX512DQ__)
  const Floats r = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);  // x - floor(x), 0 for -Inf
  const Floats p = polynomial(r, 1.86713028e-3f, 9.01702978e-3f, 5.57999127e-2f, 2.40164444e-1f, 6.93151295e-1f, 1.0f);
  return _mm512_maskz_scalef_ps(0xffff, p, x);  // p * 2^floor(x)
#else
  // Smaller numbers give 2^-126: they are lost in a sum that contains a 1.
  x = larger(broadcast(-126.0f), x);  // x if it is NaN
  const Floats n = nearest(x);
  const Floats p =
      polynomial(x - n, 1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f);
  return times_power_of_two(p, n);
#endif
}

}  // namespace
}  // namespace namedmask::cpu
