// SPDX-License-Identifier: MIT
// Eight doubles at a time on every level, in whatever registers it has, so that sums are added in the same order and
// give the same bits; level.h says what is allowed here.
#pragma once

#include <cstdint>

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
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, W);
}

// The lanes' sum in the order that halving a vector gives.
inline double fold(const W& w) { return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7])); }

}  // namespace
}  // namespace namedmask::cpu
