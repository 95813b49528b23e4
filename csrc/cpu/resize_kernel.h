// SPDX-License-Identifier: MIT
// resize's inner loops, compiled once per instruction level; level.h describes the rules.
#include "resize_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

typedef VectorOf<float, 4>::Type Floats4;

inline Floats values(const float* p) { return load(p); }

inline Floats values(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Floats);
#endif
}

template <class T>
void blend_rows(const T* rows, int64_t stride, const float* weights, int64_t taps, int64_t n, float* out) {
  constexpr int kTogether = 4;  // vectors, so that their sums hide each other's latency
  int64_t i = 0;
  for (; i + kTogether * kLanes <= n; i += kTogether * kLanes) {
    Floats sums[kTogether] = {};
    for (int64_t k = 0; k < taps; ++k) {
      const Floats weight = broadcast<Floats>(weights[k]);
      for (int v = 0; v < kTogether; ++v) sums[v] = fma(values(rows + k * stride + i + v * kLanes), weight, sums[v]);
    }
    for (int v = 0; v < kTogether; ++v) store(out + i + v * kLanes, sums[v]);
  }
  for (; i + kLanes <= n; i += kLanes) {
    Floats sum = {};
    for (int64_t k = 0; k < taps; ++k) {
      sum = fma(values(rows + k * stride + i), broadcast<Floats>(weights[k]), sum);
    }
    store(out + i, sum);
  }
  for (; i < n; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < taps; ++k) sum = __builtin_fmaf(static_cast<float>(rows[k * stride + i]), weights[k], sum);
    out[i] = sum;
  }
}

// A pixel of up to four channels is a vector; what it holds beyond them is overwritten by the next pixel.
void blend_vectors(const float* row, const RowTaps& taps, int64_t width, int64_t channels, float* out) {
  const float* weights = taps.weights;
  for (int64_t x = 0; x < width; ++x, weights += taps.count) {
    const float* pixel = row + taps.first[x] * channels;
    Floats4 even = {}, odd = {};
    int64_t k = 0;
    for (; k + 2 <= taps.count; k += 2, pixel += 2 * channels) {
      even += load<Floats4>(pixel) * weights[k];
      odd += load<Floats4>(pixel + channels) * weights[k + 1];
    }
    if (k < taps.count) even += load<Floats4>(pixel) * weights[k];
    store(out + x * channels, even + odd);
  }
}

void blend_pixels(const float* row, const RowTaps& taps, int64_t width, int64_t channels, float* out) {
  if (channels == 3 || channels == 4) return blend_vectors(row, taps, width, channels, out);
  for (int64_t x = 0; x < width; ++x) {
    const float *pixel = row + taps.first[x] * channels, *weights = taps.weights + x * taps.count;
    for (int64_t c = 0; c < channels; ++c) {
      float sum = 0;
      for (int64_t k = 0; k < taps.count; ++k) sum += pixel[k * channels + c] * weights[k];
      out[x * channels + c] = sum;
    }
  }
}

void to_floats(const uint8_t* bytes, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bytes[i];
}

void to_bytes(const float* values, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = values[i] < 0 ? 0 : values[i] > 255 ? 255 : values[i];
    out[i] = static_cast<uint8_t>(value + 0.5f);
  }
}

constexpr ResizeKernels kKernels = {blend_pixels, blend_rows<uint8_t>, blend_rows<float>, to_floats, to_bytes};

}  // namespace
}  // namespace namedmask::cpu
