// SPDX-License-Identifier: MIT
// Hash tables that find the first item of every key, independent of the order of threads.
#pragma once

#include "launch.h"

namespace namedmask::cuda {
namespace {

constexpr int32_t kNone = -1;

// A range of slots that is a separate table.
struct Region {
  int64_t begin;
  int32_t size;
};

// A slot holds kNone or an item; after all insertions, the first item of its key. A region must have more slots than
// keys; with twice as many, searches are short.
template <class Key>
struct FirstTable {
  int32_t* slots;
  const Key* keys;  // of the items

  static __device__ int32_t home(Key key, const Region& region) {
    const unsigned scrambled = static_cast<unsigned>(static_cast<uint64_t>(key) * 0x9e3779b97f4a7c15u >> 32);
    return static_cast<int32_t>(static_cast<uint64_t>(scrambled) * static_cast<unsigned>(region.size) >> 32);
  }

  // Returns the slot of the item's key, relative to the region.
  __device__ int32_t insert(const Region& region, int32_t item) const {
    const Key key = keys[item];
    for (int32_t i = home(key, region);; i = i + 1 == region.size ? 0 : i + 1) {
      int32_t* const slot = &slots[region.begin + i];
      int32_t held = *const_cast<volatile int32_t*>(slot);
      if (held == kNone) held = atomicCAS(slot, kNone, item);
      if (held == kNone) return i;
      if (keys[held] != key) continue;
      if (item < held) atomicMin(slot, item);
      return i;
    }
  }

  // The first item of a key, or kNone.
  __device__ int32_t find(const Region& region, Key key) const {
    for (int32_t i = home(key, region);; i = i + 1 == region.size ? 0 : i + 1) {
      const int32_t held = slots[region.begin + i];
      if (held == kNone || keys[held] == key) return held;
    }
  }
};

}  // namespace
}  // namespace namedmask::cuda
