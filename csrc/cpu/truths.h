// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace namedmask::cpu {
namespace {

// Eight bytes -> 1 for each that is not 0. A bool array may view such bytes, as masks of OpenCV do.
inline uint64_t truths(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  return (((bytes & kLow) + kLow) | bytes) >> 7 & 0x0101010101010101;
}

}  // namespace
}  // namespace namedmask::cpu
