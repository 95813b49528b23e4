// SPDX-License-Identifier: MIT
// The layout of dense_crf's arrays with many channels; part of dense_crf_kernel.h.
#pragma once

#include "dense_crf_levels.h"
#include "simd.h"

namespace namedmask::cpu {
namespace {

constexpr int kAxes = CrfSystem::kAxes, kCorners = CrfSystem::kCorners;
constexpr int kTaps = CrfSystem::kTaps, kSums = CrfSystem::kSums;
constexpr int kGroup = CrfSystem::kGroup, kPlane = CrfSystem::kPlane;
constexpr int kRowsAtOnce = CrfSystem::kRowsAtOnce, kBlurRows = CrfSystem::kBlurRows;
constexpr int kBandNodes = CrfSystem::kBandNodes;
typedef VectorOf<float, (kLanes > 8 ? kLanes : 8)>::Type Wide;

inline void fill(float* p, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

inline void swap(float*& a, float*& b) {
  float* const was = a;
  a = b;
  b = was;
}

// Where the vector that begins with channel c of item 0 lies in an array [items, channels], and the distance between
// items.
struct Place {
  int64_t begin, stride;
};
inline Place place(int64_t c, int64_t channels, int64_t items) {
  const int64_t wide = channels / kPlane * kPlane;
  if (c >= wide) return {c * items, kGroup};
  return {c / kPlane * kPlane * items + c % kPlane, kPlane};
}

// Calls f(c, lanes) for the planes, which begin with channel c and hold `lanes` channels.
template <class F>
inline void for_each_plane(int64_t channels, F f) {
  if (channels == 1) return f(0, 1);
  for (int64_t c = 0, lanes; c < channels; c += lanes) {
    lanes = channels - c < kPlane ? kGroup : kPlane;
    f(c, lanes);
  }
}

// 8, 16 or 24 channels of an item, a plane or two: what belongs to the item alone, such as its vertices, is read once
// for both.
template <int kChannels>
struct Block {
  static constexpr int kFirst = kChannels < kPlane ? kChannels : kPlane, kSecond = kChannels - kFirst;  // of each plane
  static constexpr int kWide = kLanes > 8 ? kChannels / 16 : 0, kHalves = kChannels / 8 - 2 * kWide;
  typedef std::conditional_t<(kWide > 0), Floats, Floats8> Longest;  // one in all lanes serves each of its vectors
  Floats wide;                                                       // if kWide is 1
  Floats8 half[3];

  // Replaces each vector by f(vector, its first channel, those of the other blocks).
  template <class F, class... Others>
  inline __attribute__((always_inline)) void replace(F f, const Others&... others) {
    if constexpr (kWide > 0) wide = f(wide, 0, others.wide...);
    if constexpr (kHalves > 0) half[0] = f(half[0], 16 * kWide, others.half[0]...);
    if constexpr (kHalves > 1) half[1] = f(half[1], 16 * kWide + 8, others.half[1]...);
    if constexpr (kHalves > 2) half[2] = f(half[2], 16 * kWide + 16, others.half[2]...);
  }
};

// The channels of a block in an array [items, channels].
template <class B>
struct Planes {
  float *first, *second;

  Planes(float* array, int64_t c, int64_t items) : first(array + c * items), second(first + B::kFirst * items) {}

  float* at(int64_t item, int channel) const {
    return channel < B::kFirst ? first + item * B::kFirst + channel : second + item * B::kSecond + channel - B::kFirst;
  }

  B load(int64_t item) const {
    B block;
    block.replace([&](auto v, int channel) { return cpu::load<decltype(v)>(at(item, channel)); });
    return block;
  }

  void store(int64_t item, B block) const {
    block.replace([&](auto v, int channel) {
      cpu::store(at(item, channel), v);
      return v;
    });
  }
};

// Calls f(Block{}, its first channel) for all channels.
template <class F>
inline __attribute__((always_inline)) void for_each_block(int64_t channels, F f) {
  int64_t c = 0;
  for (; channels - c >= kPlane && channels - c != kPlane + kGroup; c += kPlane) f(Block<kPlane>{}, c);
  if (channels - c > kGroup) return f(Block<kPlane + kGroup>{}, c);
  if (channels - c > 0) f(Block<kGroup>{}, c);
}

}  // namespace
}  // namespace namedmask::cpu
