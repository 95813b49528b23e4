// SPDX-License-Identifier: MIT
// pamr's inner loops, compiled once per instruction level; level.h describes the rules.
//
// Processes a vector of adjacent pixels of a row at a time, so that every neighbor is a load at another offset.
#include "exponential.h"
#include "pamr_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

static_assert(kPamrColumns % kLanes == 0);

constexpr int64_t kMaxNeighbors = 8 * kPamrDilations;
constexpr float kOne = 65535;  // the largest stored root
constexpr int kTogether = 8;   // planes that share a pass over the weights: enough independent sums to hide the latency

typedef uint16_t Stored __attribute__((vector_size(kLanes * 2)));

// Weights are stored as square roots, which reduces the rounding error of small ones, of which there are many.
inline Floats weight(const uint16_t* p) {
#if defined(__AVX512F__)  // GCC 12 compiles the general form to five instructions; a mask as in simd.h
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const Floats root = __builtin_convertvector((Ints)_mm512_maskz_cvtepu16_epi32(0xffff, stored), Floats);
#else
  Stored stored;
  __builtin_memcpy(&stored, p, sizeof stored);
  const Floats root = __builtin_convertvector(__builtin_convertvector(stored, Ints), Floats);
#endif
  return root * root;
}

// Offsets from a pixel of row y to each of its neighbors in the same plane.
inline void neighbor_offsets(const PamrImage& image, int64_t planes, int64_t y, int64_t* offsets) {
  for (int64_t i = 0; i < image.n_dilations; ++i) {
    const int64_t d = image.dilations[i], dx = d < image.width ? d : image.width;
    const int64_t rows[] = {d < y ? y - d : 0, y, d < image.height - y ? y + d : image.height - 1};
    for (int j = 0; j < 9; ++j) {
      if (j != 4) *offsets++ = (rows[j / 3] - y) * pamr_row(image.stride, planes) + (j % 3 - 1) * dx;
    }
  }
}

void affinities(const PamrImage& image, int64_t y) {
  const int64_t neighbors = 8 * image.n_dilations;
  const float samples = static_cast<float>(9 * image.n_dilations);
  int64_t offsets[kMaxNeighbors];
  neighbor_offsets(image, 3, y, offsets);
  uint16_t* out = image.weights + y * pamr_weights(image.columns, image.n_dilations);
  for (int64_t x = 0; x < image.columns; x += kLanes) {
    Floats logits[kMaxNeighbors] = {};
    for (int64_t c = 0; c < 3; ++c) {
      const float* color = image.colors + y * pamr_row(image.stride, 3) + c * image.stride + image.pad + x;
      const Floats center = load(color);
      Floats sum = {}, squares = {};  // of the differences from the center: exact integers below 2^24
      for (int64_t k = 0; k < neighbors; ++k) {
        const Floats difference = load(color + offsets[k]) - center;
        sum = sum + difference;
        squares = fma(difference, difference, squares);
      }
      const Ints n = Ints{} + static_cast<int32_t>(9 * image.n_dilations), s = __builtin_convertvector(sum, Ints);
      const Floats spread = __builtin_convertvector(n * __builtin_convertvector(squares, Ints) - s * s, Floats);
      const Floats deviation = square_root(spread / broadcast(samples * (samples - 1)));
      const Floats factor = broadcast(-1.0f / 3) / fma(broadcast(0.1f), deviation, broadcast(255 * 1e-8f));
      for (int64_t k = 0; k < neighbors; ++k) {
        const Floats difference = load(color + offsets[k]) - center;
        logits[k] = fma((Floats)((Ints)difference & 0x7fffffff), factor, logits[k]);
      }
    }
    Floats top = logits[0];
    for (int64_t k = 1; k < neighbors; ++k) top = larger(top, logits[k]);
    Floats total = {};
    for (int64_t k = 0; k < neighbors; ++k) {
      const Floats root = exponential_or_zero((logits[k] - top) * broadcast(0.5f));
      const Ints rounded = (Ints)fma(root, broadcast(kOne), broadcast(kRoundingBias)) & 0xffff;
      const Stored stored = __builtin_convertvector(rounded, Stored);
      __builtin_memcpy(out, &stored, sizeof stored);
      total = total + weight(out);
      out += kLanes;
    }
    const Floats scale = broadcast(1.0f) / total;
    __builtin_memcpy(out, &scale, sizeof scale);
    out += 2 * kLanes;
  }
}

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// Replaces the averages of a vector of pixels that are not finite, since weights of up to 2^32 overflow for masks above
// 2^90: with masks times 2^-64, finite masks stay finite.
[[gnu::noinline]] void average_huge(const uint16_t* weights, const int64_t* offsets, int64_t neighbors,
                                    const float* source, float* target) {
  Floats sum = {}, scale;
  for (int64_t k = 0; k < neighbors; ++k) {
    sum = fma(weight(weights + k * kLanes), load(source + offsets[k]) * 0x1p-64f, sum);
  }
  __builtin_memcpy(&scale, weights + neighbors * kLanes, sizeof scale);
  const Floats most = broadcast(3.402823466e38f), known = load(target), small = sum * scale, large = small * 0x1p64f;
  const Floats clamped = select(large > most, most, select(large < -most, -most, large));
  const Ints was_finite = known - known == 0.0f, is_finite = small - small == 0.0f;
  store(target, select(was_finite, known, select(is_finite, clamped, large)));
}

// Averages a vector of pixels in kPlanes planes; source and target point to it in the first plane.
template <int kPlanes>
void average_vector(const uint16_t* weights, const int64_t* offsets, int64_t neighbors, const float* source,
                    int64_t stride, float* target) {
  Floats sums[kPlanes] = {};
  for (int64_t k = 0; k < neighbors; ++k) {
    const Floats factor = weight(weights + k * kLanes);
    const float* p = source + offsets[k];
#pragma GCC unroll 8
    for (int i = 0; i < kPlanes; ++i) sums[i] = fma(factor, load(p + i * stride), sums[i]);
  }
  Floats scale;
  __builtin_memcpy(&scale, weights + neighbors * kLanes, sizeof scale);
  Floats finite = {};  // 0, or NaN where a sum is not finite
#pragma GCC unroll 8
  for (int i = 0; i < kPlanes; ++i) {
    store(target + i * stride, sums[i] * scale);
    finite = fma(sums[i], Floats{}, finite);
  }
  if (above(broadcast(1.0f), finite) == kAllLanes) return;
  for (int i = 0; i < kPlanes; ++i) average_huge(weights, offsets, neighbors, source + i * stride, target + i * stride);
}

// average_vector for 1 to kTogether planes.
template <int kPlanes = kTogether>
inline decltype(&average_vector<1>) average_vector_of(int64_t planes) {
  if constexpr (kPlanes > 1) {
    if (planes < kPlanes) return average_vector_of<kPlanes - 1>(planes);
  }
  return average_vector<kPlanes>;
}

void average(const PamrImage& image, const float* source, float* target, int64_t planes, int64_t y, int64_t begin,
             int64_t end) {
  const int64_t neighbors = 8 * image.n_dilations, row = y * pamr_row(image.stride, planes) + image.pad;
  int64_t offsets[kMaxNeighbors];
  neighbor_offsets(image, planes, y, offsets);
  const uint16_t* weights = image.weights + y * pamr_weights(image.columns, image.n_dilations);
  for (int64_t p = 0; p < planes; p += kTogether) {
    const int64_t together = planes - p < kTogether ? planes - p : kTogether;
    const int64_t at = row + p * image.stride;
    const auto average_one = average_vector_of(together);
    for (int64_t x = begin; x < end; x += kLanes) {
      average_one(weights + x * (neighbors + 2), offsets, neighbors, source + at + x, image.stride, target + at + x);
    }
  }
}

constexpr PamrKernels kKernels = {affinities, average};

}  // namespace
}  // namespace namedmask::cpu
