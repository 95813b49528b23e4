// SPDX-License-Identifier: MIT
// dense_crf's permutohedral lattice, the bilateral term; part of dense_crf_kernel.h.
#pragma once

#include "dense_crf_channels.h"

namespace namedmask::cpu {
namespace {

// Sections 3.1 and 3.2 of Adams et al.: maps the pixel into the plane where coordinates sum to 0 and finds the nearest
// remainder-0 point; the order of the differences gives the simplex around the pixel.
void embed(const float* features, CrfSimplices* simplices, float* weights) {
  Floats8 elevated[kCorners], sum = {};
  for (int i = kAxes; i > 0; --i) {
    const Floats8 f = load<Floats8>(features + (i - 1) * kGroup);
    elevated[i] = sum - static_cast<float>(i) * f;
    sum += f;
  }
  elevated[0] = sum;

  Floats8 nearest_point[kCorners], difference[kCorners], total = {};
  for (int i = 0; i < kCorners; ++i) {
    nearest_point[i] = nearest(elevated[i] * (1.0f / kCorners));
    difference[i] = elevated[i] - static_cast<float>(kCorners) * nearest_point[i];
    total += nearest_point[i];
  }
  Ints8 rank[kCorners];  // 0: the largest difference
  for (Ints8& r : rank) r = __builtin_convertvector(total, Ints8);
  for (int i = 0; i < kCorners; ++i) {
    for (int j = i + 1; j < kCorners; ++j) {
      const Ints8 less = difference[i] < difference[j];  // -1 where true
      rank[i] -= less;
      rank[j] += 1 + less;
    }
  }
  Floats8 sorted[kCorners];
  Ints8 order = {}, point[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    // The rounded coordinates may not sum to 0: those rounded farthest move back one step.
    const Ints8 up = rank[i]<0, down = rank[i]> kAxes;
    const Ints8 back = down - up;  // +1, -1 or 0
    rank[i] += kCorners * back;
    const Floats8 moved = __builtin_convertvector(back, Floats8);
    sorted[i] = difference[i] * (1.0f / kCorners) - moved;
    point[i] = __builtin_convertvector(nearest_point[i], Ints8) + back;
    order |= i << (3 * (kAxes - rank[i]));
  }
  // A sorting network, largest first.
  constexpr int kExchanges[][2] = {{0, 5}, {1, 3}, {2, 4}, {1, 2}, {3, 4}, {0, 3},
                                   {2, 5}, {0, 1}, {2, 3}, {4, 5}, {1, 2}, {3, 4}};
  for (const auto& [a, b] : kExchanges) {
    const Floats8 high = larger(sorted[a], sorted[b]);
    sorted[b] = smaller(sorted[a], sorted[b]);
    sorted[a] = high;
  }
  store(weights, 1.0f + sorted[kAxes] - sorted[0]);
  for (int r = 1; r < kCorners; ++r) store(weights + r * kGroup, sorted[kCorners - 1 - r] - sorted[kCorners - r]);

  constexpr int32_t kBias = 1 << 11;
  const auto put = [](int32_t* to, Ints8 v) { __builtin_memcpy(to, &v, sizeof(v)); };
  put(simplices->low, (point[0] + kBias) + ((point[1] + kBias) << 12));
  put(simplices->middle, (point[2] + kBias) + ((point[3] + kBias) << 12));
  put(simplices->high, point[4] + kBias);
  put(simplices->order, order);
}

// Adds `cells` lanes of pixels, each times its weights, to their vertices.
void splat_line(float* lattice, const int32_t* corners, const float* weights, const float* line, int64_t cells) {
  for (int64_t cell = 0; cell < cells; cell += kGroup, corners += kCorners * kGroup, weights += kCorners * kGroup) {
    float products[kCorners * kGroup];
    for (int r = 0; r < kCorners; ++r)
      store(products + r * kGroup, load<Floats8>(weights + r * kGroup) * load<Floats8>(line + cell));
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < kCorners; ++r) {
        lattice[kSums * static_cast<int64_t>(corners[r * kGroup + i]) + i % kSums] += products[r * kGroup + i];
      }
    }
  }
}

inline Floats8 slice(const float* lattice, const int32_t* corners, const float* weights) {
  Floats8 sum = {};
#pragma GCC unroll 6
  for (int r = 0; r < kCorners; ++r) {
    sum = fma(load<Floats8>(weights + r * kGroup), gather(lattice, corners + r * kGroup), sum);
  }
  return sum;
}

// Calls f(from, to, near, scale) for the six directions, alternating between lattice and scratch. Their number is even,
// so the result is in `lattice`.
template <class F>
inline void for_each_direction(CrfSystem s, float* lattice, float* scratch, float scale, F f) {
  for (int j = 0; j < kCorners; j += 2) {
    f(lattice, scratch, s.neighbors + 2 * j * s.vertices, 1.0f);
    f(scratch, lattice, s.neighbors + 2 * (j + 1) * s.vertices, j + 2 == kCorners ? scale : 1.0f);
  }
}

// Blurs the vertices direction by direction: each plus half of its two neighbors. The result is multiplied by `scale`.
void blur_one(CrfSystem s, float* lattice, float* scratch, float scale) {
  for (int64_t i = 0; i <= s.vertices; ++i) lattice[i] = lattice[kSums * i] + lattice[kSums * i + 1];
  for_each_direction(s, lattice, scratch, scale, [&](const float* from, float* to, const int32_t* near, float own) {
    const int64_t whole = s.vertices / kGroup * kGroup;
    const float other = 0.5f * own;
    for (int64_t i = 0; i < whole; i += kGroup, near += 2 * kGroup) {
      Floats8 around;
      for (int lane = 0; lane < kGroup; ++lane) around[lane] = from[near[2 * lane]] + from[near[2 * lane + 1]];
      store(to + i, fma(around, broadcast<Floats8>(other), load<Floats8>(from + i) * own));
    }
    for (int64_t i = whole; i < s.vertices; ++i, near += 2) {
      to[i] = fma(broadcast<Floats8>(from[near[0]] + from[near[1]]), broadcast<Floats8>(other),
                  broadcast<Floats8>(from[i] * own))[0];
    }
    to[s.vertices] = 0;
  });
}

void blur_many(CrfSystem s, float* lattice, float* scratch, float scale) {
  for_each_direction(s, lattice, scratch, scale, [&](const float* from, float* to, const int32_t* near, float own) {
    const float other = 0.5f * own;
    for_each_vector(s.channels, [&](auto zero, int64_t c) {
      using V = decltype(zero);
      const Place vertex = place(c, s.channels, s.vertices + 1);
      const float* const in = from + vertex.begin;
      float* const out = to + vertex.begin;
      for (int64_t i = 0; i < s.vertices; ++i) {
        const V around = load<V>(in + near[2 * i] * vertex.stride) + load<V>(in + near[2 * i + 1] * vertex.stride);
        store(out + i * vertex.stride, fma(around, broadcast<V>(other), load<V>(in + i * vertex.stride) * own));
      }
      store(out + s.vertices * vertex.stride, V{});
    });
  });
}

void normalize(CrfSystem s) {
  const int64_t blocks = s.height * s.step * s.cells / kGroup;
  constexpr int64_t kBlock = kCorners * kGroup;
  fill(s.lattice, 0.0f, kSums * (s.vertices + 1));
  fill(s.rows, 1.0f, s.cells);
  for (int64_t b = 0; b < blocks; b += s.cells / kGroup) {
    splat_line(s.lattice, s.corners + b * kBlock, s.weights + b * kBlock, s.rows, s.cells);
  }
  blur_one(s, s.lattice, s.next_lattice, 1.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    float* const weights = s.weights + b * kBlock;
    const Floats8 norm = 1.0f / square_root(slice(s.lattice, s.corners + b * kBlock, weights) + 1e-20f);
    for (int r = 0; r < kCorners; ++r) {
      // Lanes beyond the image have weights of 0, and keep them.
      store(weights + r * kGroup, load<Floats8>(weights + r * kGroup) * norm);
    }
  }
}

}  // namespace
}  // namespace namedmask::cpu
