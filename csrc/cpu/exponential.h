// SPDX-License-Identifier: MIT
// The exponential of a vector of floats; level.h says what is allowed here.
#pragma once

#include "lanes.h"

namespace namedmask::cpu {
namespace {

// e^x for x <= 0: 0 below -87.3, NaN for NaN. A power of two times a polynomial on [-ln 2 / 2, ln 2 / 2]; ln 2 is taken
// in two parts, the first with few bits, so that nothing is lost where there is no fused multiply-add.
inline V exponential(V x) {
  const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V shifted = fma(x, broadcast(1.44269504f), magic);
  const V n = shifted - magic;
  V r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  V p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  const V power = (V)(((I)shifted - (I)magic + 127) << 23);
  const I keep = ~(I)(x < broadcast(-87.3f));
  return (V)((I)(p * power) & keep);
}

}  // namespace
}  // namespace namedmask::cpu
