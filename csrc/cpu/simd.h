// SPDX-License-Identifier: MIT
// The vectors that the CPU kernels compute with; level.h describes the rules.
//
// Floats is as wide as a register of the instruction level. Floats8 and Doubles8 have eight lanes on every level, in
// one register or several: sums over their lanes are added in the same order, so all levels give the same bits.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace namedmask::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2;  // sums [kRows, kVectors] are a micro tile, which fills the registers of the level

template <class T, int kCount>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};
typedef VectorOf<float, kLanes>::Type Floats;
typedef VectorOf<float, 8>::Type Floats8;
typedef VectorOf<double, 8>::Type Doubles8;
template <class V>
using IntsOf = decltype(V{} < V{});  // as many integers, each as large as an element of V
typedef IntsOf<Floats> Ints;
typedef IntsOf<Floats8> Ints8;
template <class V>
using Lane = decltype(+V{}[0]);
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(Lane<V>);

// -- memory ----------------------------------------------------------------------------------------------------------

template <class V = Floats>
inline V load(const Lane<V>* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(Lane<V>* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline Ints8 first_lanes(int64_t n) { return Ints8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n); }

// The first n lanes; the others are 0, and their memory is not touched.
inline Floats8 load_first(const float* p, int64_t n) {
#if defined(__AVX2__)
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first_lanes(n)));
#else
  Floats8 v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store_first(float* p, Floats8 v, int64_t n) {
#if defined(__AVX2__)
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Lane i = values[index[i]]. The gather instruction is slow: on an AMD EPYC the whole bilateral solver took 1.6 times
// as long with it, and on an Intel Xeon (Sapphire Rapids) it is no faster than these loads, each of which fills all
// lanes and keeps one. Inserting single floats instead requires shuffles, which only one execution unit performs: the
// loads take 0.86 of that time.
inline Floats8 gather(const float* values, const int32_t* index) {
#if defined(__AVX2__)
  const auto lane = [&](int i) { return _mm256_broadcast_ss(values + index[i]); };
  const __m256 ab = _mm256_blend_ps(lane(0), lane(1), 0xaa), cd = _mm256_blend_ps(lane(2), lane(3), 0xaa);
  const __m256 ef = _mm256_blend_ps(lane(4), lane(5), 0xaa), gh = _mm256_blend_ps(lane(6), lane(7), 0xaa);
  return _mm256_blend_ps(_mm256_blend_ps(ab, cd, 0xcc), _mm256_blend_ps(ef, gh, 0xcc), 0xf0);
#else
  return Floats8{values[index[0]], values[index[1]], values[index[2]], values[index[3]],
                 values[index[4]], values[index[5]], values[index[6]], values[index[7]]};
#endif
}

// -- lane by lane ----------------------------------------------------------------------------------------------------

template <class V = Floats>
inline V broadcast(Lane<V> a) {
  return a - V{};
}

// Of a vector that is as long, or of 16 lanes.
template <class V, class Longer>
inline __attribute__((always_inline)) V first_lanes_of(Longer v) {
  if constexpr (sizeof(V) == sizeof(Longer)) {
    return v;
  } else {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  }
}

template <class V>
inline IntsOf<V> bits(V v) {
  return reinterpret_cast<IntsOf<V>>(v);
}

template <class V>
inline V select(IntsOf<V> mask, V a, V b) {
  return mask ? a : b;
}

// a * b + c, fused where the level has the instruction; the larger and the smaller of a and b, and b where one is NaN.
#if defined(__AVX2__)
inline Floats8 fma(Floats8 a, Floats8 b, Floats8 c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats8 larger(Floats8 a, Floats8 b) { return _mm256_max_ps(a, b); }
inline Floats8 smaller(Floats8 a, Floats8 b) { return _mm256_min_ps(a, b); }
#else
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
inline V larger(V a, V b) {
  return select(a > b, a, b);
}
template <class V>
inline V smaller(V a, V b) {
  return select(a < b, a, b);
}
#endif
#if defined(__AVX512F__)
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// With a mask of ones: GCC 12 warns about an uninitialized source operand in the plain intrinsic.
inline Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#endif

// Bit i: lane i of a exceeds lane i of b.
inline uint32_t above(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#else
  uint32_t set = 0;
  for (int i = 0; i < kLanes; ++i) set |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return set;
#endif
}

template <class V>
inline V square_root(V v) {
  float lanes[kLanesOf<V>];
  store(lanes, v);
  for (float& lane : lanes) lane = __builtin_sqrtf(lane);
  return load<V>(lanes);
}

constexpr float kRoundingBias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits

// The nearest integer, |v| < 2^22.
template <class V>
inline V nearest(V v) {
  return (v + kRoundingBias) - kRoundingBias;
}

// -- across lanes ----------------------------------------------------------------------------------------------------

template <int kStep, class V, int... kLane>
inline V with_lanes_exchanged(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}

// f(a, b) over all lanes by halving the vector, in every lane of the result.
template <class V, class F, int kStep = kLanesOf<V> / 2>
inline V reduce_lanes(V v, F f) {
  v = f(v, with_lanes_exchanged<kStep>(v, std::make_integer_sequence<int, kLanesOf<V>>()));
  if constexpr (kStep > 1) return reduce_lanes<V, F, kStep / 2>(v, f);
  return v;
}

template <class V>
inline V largest_lane(V v) {
  return reduce_lanes(v, [](V a, V b) { return larger(a, b); });
}

template <class V>
inline float sum_of_lanes(V v) {
  return reduce_lanes(v, [](V a, V b) { return a + b; })[0];
}

// The same order of additions, in doubles.
inline double sum_of_lanes(const Doubles8& v) {
#if defined(__AVX512F__)
  const __m256d half =
      _mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 0) + _mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 1);
  const __m128d quarter = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return quarter[0] + quarter[1];
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// -- doubles ---------------------------------------------------------------------------------------------------------

inline Doubles8 load_widened(const float* p) {
#if defined(__AVX512F__)
  return (Doubles8)_mm512_maskz_cvtps_pd(0xff,
                                         _mm256_loadu_ps(p));  // GCC 12 compiles the other form to six instructions
#else
  return __builtin_convertvector(load<Floats8>(p), Doubles8);
#endif
}

inline void store_narrowed(float* p, const Doubles8& v) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_maskz_cvtpd_ps(0xff, (__m512d)v));
#else
  store(p, __builtin_convertvector(v, Floats8));
#endif
}

// a * b + c where a double represents the product exactly: fused or not, the bits are the same.
inline Doubles8 add_exact_product(const Doubles8& a, const Doubles8& b, const Doubles8& c) {
#if defined(__AVX512F__)
  return (Doubles8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return a * b + c;
#endif
}

// -- loops -----------------------------------------------------------------------------------------------------------

// Calls f(V{}, i) for i = 0, lanes of V, ... up to n, a multiple of 8: V is Floats while it fits, if that is the wider
// type, then Floats8.
template <class F>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  if constexpr (kLanes > 8) {
    for (; i + kLanes <= n; i += kLanes) f(Floats{}, i);
  }
  for (; i < n; i += 8) f(Floats8{}, i);
}

// sums[i][v] += a[i * a_stride + k * k_stride] * (vector v of row k of b), for k < depth in order. columns(v) points to
// vector v of row 0 of b. An element's bits depend only on its row and its column.
template <int kWide, class Columns>
inline __attribute__((always_inline)) void multiply_add(Floats (&sums)[kRows][kWide], const float* a, int64_t a_stride,
                                                        int64_t k_stride, Columns columns, int64_t b_stride,
                                                        int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Floats b[kWide];
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) b[v] = load(columns(v) + k * b_stride);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Floats factor = broadcast(a[i * a_stride + k * k_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) sums[i][v] = fma(factor, b[v], sums[i][v]);
    }
  }
}

}  // namespace
}  // namespace namedmask::cpu
